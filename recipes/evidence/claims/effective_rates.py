"""Claim 3: what the rule makes of the rate, over time and over depth."""

from __future__ import annotations

from statistics import median

from recipes.evidence.claim import WORSE, Claim, Figure, Panel, Results, Verdict
from recipes.evidence.claims.warmup import OURS, warmup_variants

RATED = ("ViT", "GPT-2")
LATER = ("shallow_over_deep", "w2_over_w1")


def _judge_rates(results: Results) -> Verdict:
    findings, rising, falling = [], 0, 0
    clipped, opposite = dict.fromkeys(LATER, 0), dict.fromkeys(LATER, 0)
    for model in RATED:
        rates = [run["rates"] for run in results[f"{model}, {OURS}"]]
        early, late, *ratios = (median(r[key] for r in rates) for key in ("early", "late", *LATER))
        rising += WORSE * early < late
        falling += WORSE * late < early
        for key, ratio in zip(LATER, ratios, strict=True):
            clipped[key] += WORSE * ratio < 1
            opposite[key] += ratio > WORSE
        findings.append(
            f"{model}: AdamW2 uses a share of {early:.2g} of the scheduled rate in the first fifth "
            f"of the steps, and {late:.2g} later (medians). Over the first half the rate of "
            f"shallow blocks is {ratios[0]:.2f} times that of deep ones, and that of W2 "
            f"{ratios[1]:.2f} times that of W1."
        )
    shallow, second = (_clipping(clipped[key], opposite[key]) for key in LATER)
    sentence = (
        f"Rates rise as in a warmup on {rising} of {len(RATED)} models; shallow blocks are "
        f"{shallow}, and W2 is {second}."
    )
    if all(count == len(RATED) for count in (rising, *clipped.values())):
        word = "reproduced"
    elif rising or any(clipped.values()):
        word = "partly"
    else:
        is_refuted = all(count == len(RATED) for count in (falling, *opposite.values()))
        word = "refuted" if is_refuted else "not at this scale"
    return Verdict(word, sentence, tuple(findings))


def _clipping(more: int, less: int) -> str:
    """Return in words on how many models something is clipped more, or less, by over 5 %."""
    total = len(RATED)
    if more == total:
        return "clipped more, as claimed"
    if less == total:
        return "clipped less: refuted"
    counts = {"more": more, "less": less, "no differently": total - more - less}
    if counts["no differently"] == total:
        return "clipped no differently"
    return "clipped " + ", ".join(f"{how} on {n} of {total}" for how, n in counts.items() if n)


CLAIM = Claim(
    "3", "Effective rates look like a warmup",
    "The effective rate looks like a warmup; shallow layers and W2 are clipped more "
    "(Qi et al. 2025, Appendix M)",
    tuple(v for v in warmup_variants() if v.name in [f"{m}, {OURS}" for m in RATED]),
    _judge_rates,
    needs=frozenset({"rates"}),
    figure=Figure(
        tuple((f"{model}, {OURS}",) for model in RATED),
        (Panel("mean rate used in each block", "blocks"), Panel("training loss", "loss")),
    ),
)  # fmt: skip

"""Claim 5: two kinds of collapse, told apart."""

from __future__ import annotations

from collections import Counter

from recipes.evidence.claim import Claim, Results, Verdict, failures, of
from recipes.evidence.claims.collapse import COLLAPSE
from recipes.evidence.claims.warmup import CONTROL, OURS, PLAIN, warmup_variants

LOOKED_AT = (
    *of(COLLAPSE),
    *(
        variant
        for variant in warmup_variants()
        if variant.name.endswith(CONTROL)
        or variant.name in (f"ViT, {OURS}", f"GPT-2, {OURS}", f"GPT-2, {PLAIN}")
    ),
)
LEAST_SHARE = 0.01
"""Of all head maps; a mode with fewer does not count as one that occurs."""


def _judge_modes(results: Results) -> Verdict:
    """Judge whether both modes occur, and are told apart: by whether their runs failed."""
    totals: Counter[str] = Counter()
    in_failed: Counter[str] = Counter()
    for name, runs in results.items():
        for run in runs:
            totals.update(run["modes"])
            if failures({name: [run]}, name):
                in_failed.update(run["modes"])
    defined = sum(totals.values()) - totals["undefined"]
    sentence = (
        f"Of {defined} head maps {totals['malignant']} are malignant and {totals['benign']} benign."
    )
    findings = (
        f"{defined} head maps were looked at, in {len(results)} set-ups.",
        f"{in_failed['malignant']} of the malignant maps and {in_failed['benign']} of the benign "
        "ones are from runs that failed.",
        f"Another {totals['undefined']} maps are from steps after the weights were NaN, when there "
        "is no attention to look at.",
    )
    told, confused = 0, 0
    for mode, share_in_place in (
        ("malignant", in_failed["malignant"] / max(totals["malignant"], 1)),
        ("benign", 1 - in_failed["benign"] / max(totals["benign"], 1)),
    ):
        occurs = totals[mode] >= LEAST_SHARE * defined and totals[mode] > 0
        told += occurs and share_in_place > 0.5
        confused += occurs and share_in_place < 0.5
    if told:
        return Verdict(("partly", "reproduced")[told - 1], sentence, findings)
    return Verdict("refuted" if confused == 2 else "not at this scale", sentence, findings)


CLAIM = Claim(
    "5", "Two kinds of collapse",
    "Benign and malignant collapse occur and are told apart (Qi et al. 2025, "
    "Figure 3)",
    LOOKED_AT, _judge_modes, needs=frozenset({"modes"}),
)  # fmt: skip

"""Claim 10: whether unstable runs are above the threshold of sharpness."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

from recipes.evidence.claim import Claim, Figure, Panel, Results, Verdict, of
from recipes.evidence.runs import ADAMW2, NO_NORMS, NO_NORMS_SIGMA, STD_VIT, VIT

SPIKE_STEPS = 12
SPIKE = dict(
    steps=SPIKE_STEPS, monitor_every=1, sharpness_every=1, lr_scheduler_type="constant",
)  # fmt: skip
"""The first steps of a longer run, in which its schedule has hardly begun, each measured."""

SHARPNESS_PAIRS = (
    ("ViT, lr 3e-2, AdamW", "ViT, lr 3e-2, AdamW2"),
    ("ViT without block norms, plain", "ViT without block norms, sigmaReparam"),
)
SHARPNESS = {
    "ViT, lr 3e-2, AdamW": replace(VIT, learning_rate=3e-2, **SPIKE),
    "ViT, lr 3e-2, AdamW2": replace(VIT, learning_rate=3e-2, **ADAMW2, **SPIKE),
    "ViT without block norms, plain": replace(STD_VIT, patch=NO_NORMS, **SPIKE),
    "ViT without block norms, sigmaReparam": replace(STD_VIT, patch=NO_NORMS_SIGMA, **SPIKE),
}


MARGIN = 0.1
"""Difference of shares that counts: more than one of the eleven measurements."""


def _judge_sharpness(results: Results) -> Verdict:
    """Judge by the threshold of the rate used and by that of the scheduled one.

    AdamW2 has a rate for each matrix, and it is open which one rate stands for them all: a pair
    shows the claim, or its opposite, if both thresholds say so.
    """
    findings, disputed, signs = [], [], []
    for unstable, stable in SHARPNESS_PAIRS:
        by_key: dict[str, list[float]] = {"above": [], "above_scheduled": []}
        for name in (unstable, stable):
            runs = results[name]
            for key, shares in by_key.items():
                shares.append(mean(run[key] for run in runs))
            share, scheduled = (shares[-1] for shares in by_key.values())
            first = ["never" if r["first_above"] is None else str(r["first_above"]) for r in runs]
            by_other = f" By the scheduled rate it is {scheduled:.2f}." * (scheduled != share)
            findings.append(
                f"{name}: the share of steps 2 to {SPIKE_STEPS} above the threshold is "
                f"{share:.2f}, first at steps {', '.join(first)}.{by_other}"
            )
        gaps = [shares[0] - shares[1] for shares in by_key.values()]
        signs.append([(gap > MARGIN) - (gap < -MARGIN) for gap in gaps])
        if len(set(signs[-1])) > 1:
            disputed.append(f"{unstable} and {stable}")
    findings = [
        "A run has two thresholds: that of the rate that was used, and that of the scheduled rate.",
        *findings,
        *(f"The two thresholds disagree on {pair}." for pair in disputed),
    ]
    agreed = sum(set(pair) == {1} for pair in signs)
    sentence = (
        f"The unstable run is above the threshold more often in {agreed} of {len(signs)} pairs; "
        f"the two thresholds disagree on {len(disputed)}."
    )
    if agreed == len(signs):
        word = "reproduced"
    elif any(1 in pair for pair in signs):
        word = "partly"
    else:
        is_refuted = all(set(pair) == {-1} for pair in signs)
        word = "refuted" if is_refuted else "not at this scale"
    return Verdict(word, sentence, tuple(findings))


CLAIM = Claim(
    "10", "Sharpness of unstable runs",
    "An unstable run is above the threshold of sharpness more often than a stable one",
    of(SHARPNESS), _judge_sharpness,
    needs=frozenset({"above", "above_scheduled", "first_above"}),
    figure=Figure(
        SHARPNESS_PAIRS,
        (
            Panel("sharpness over its threshold", "over_threshold", log=True),
            Panel("training loss", "loss"),
            Panel("lowest entropy, share of its largest", "entropy"),
        ),
    ),
)  # fmt: skip

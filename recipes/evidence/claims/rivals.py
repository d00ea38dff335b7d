"""Claim 11: against what users would pick instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

from recipes.evidence.claim import WORSE, Claim, Results, Verdict, losses, of, short
from recipes.evidence.runs import ADAMW2, SIGMA, VIT

RIVALS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, warmup 20 %": dict(warmup=0.2),
    "AdamW, clipped at 1": dict(max_grad_norm=1.0),
    "AdamW, QK-norm": dict(qk_norm=True, monitor_every=0),
    "StableAdamW": dict(optim="pytorch_optimizer:StableAdamW"),
    "StableSPAM": dict(optim="pytorch_optimizer:StableSPAM"),
    "AdamW2": ADAMW2,
    "sigmaReparam": SIGMA,
}
OURS = ("AdamW2", "sigmaReparam")
RIVAL_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BEST = "over all rates"


def judge_rivals(
    results: Results, *, rivals: Sequence[str], ours: Sequence[str], rates: Sequence[float]
) -> Verdict:
    """Judge at each rate, and over all of them, whether one of ours is best by more than 5 %.

    Args:
        results: of variants `METHOD at RATE`.
        rivals: all methods, ours too.
        ours: of them.
        rates: that each was tried at.
    """
    by_rate = {
        f"at {rate:g}": {m: mean(losses(results, f"{m} at {rate:g}")) for m in rivals}
        for rate in rates
    }
    tables = by_rate | {BEST: {m: min(row[m] for row in by_rate.values()) for m in rivals}}
    findings, outcomes = [], {}
    for where, by_method in tables.items():
        order = sorted(by_method, key=lambda method: by_method[method])
        own = min(by_method[method] for method in ours)
        theirs = min(loss for method, loss in by_method.items() if method not in ours)
        outcome = "win" if WORSE * own < theirs else "lose" if WORSE * theirs < own else "tie"
        outcomes[where] = outcome
        row = ", ".join(f"{method} {short(by_method[method])}" for method in order)
        findings.append(f"{where[0].upper()}{where[1:]} we {outcome}. Test loss: {row}.")
    findings.append("A tie is a difference of at most 5 %.")
    wins = sum(outcomes[where] == "win" for where in by_rate)
    by_best = tables[BEST]
    best = min(by_best, key=lambda method: by_best[method])
    sentence = (
        f"One of ours is best at {wins} of {len(by_rate)} rates; over all rates the lowest loss "
        f"is that of {best}."
    )
    if all(outcome == "win" for outcome in outcomes.values()):
        word = "we win"
    else:
        word = "mixed" if "win" in outcomes.values() else "we lose"
    return Verdict(word, sentence, tuple(findings))


CLAIM = Claim(
    "11", "Against what users would pick",
    "Against what users would pick instead",
    of(
        {
            f"{method} at {rate:g}": replace(VIT, learning_rate=rate, **changes)
            for rate in RIVAL_RATES
            for method, changes in RIVALS.items()
        }
    ),
    partial(judge_rivals, rivals=tuple(RIVALS), ours=OURS, rates=RIVAL_RATES),
)  # fmt: skip

"""Claim 12: with half precision, warmup, clipping and rollback, which runs have already."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

from recipes.evidence.claim import WORSE, Claim, Results, Verdict, loss_text, losses, of
from recipes.evidence.claims.rivals import RIVALS
from recipes.evidence.runs import ADAMW2, VIT
from recipes.settings import Settings

COMBINED_RATES = (3e-3, 1e-2)
COMBINED: dict[str, dict[str, Any]] = {
    **{name: RIVALS[name] for name in ("AdamW", "AdamW, warmup 20 %", "AdamW2", "sigmaReparam")},
    "AdamW2, warmup 20 %": ADAMW2 | dict(warmup=0.2),
    "AdamW2, clipped at 1": ADAMW2 | dict(max_grad_norm=1.0),
    "AdamW, rollback": dict(on_collapse="rollback", save_steps=25),
    "AdamW2, rollback": ADAMW2 | dict(on_collapse="rollback", save_steps=25),
}
ADDED = ("AdamW2, warmup 20 %", "AdamW2, clipped at 1")
IN_BF16 = ("AdamW", "AdamW, warmup 20 %", "AdamW2", "sigmaReparam")


def _combined_variants() -> dict[str, Settings]:
    found = {}
    for rate in COMBINED_RATES:
        for method, changes in COMBINED.items():
            settings = replace(VIT, learning_rate=rate, **changes)
            found[f"{method} at {rate:g}"] = settings
            if method in IN_BF16:
                found[f"{method}, bf16 at {rate:g}"] = replace(settings, bf16=True)
    return found


def _judge_combined(results: Results) -> Verdict:
    of_mean = partial(loss_text, results)
    findings, changed, helped = [], 0, 0
    for rate in COMBINED_RATES:
        of_rate = {name: mean(losses(results, f"{name} at {rate:g}")) for name in COMBINED}
        for method in IN_BF16:
            half = mean(losses(results, f"{method}, bf16 at {rate:g}"))
            changed += max(half, of_rate[method]) > WORSE * min(half, of_rate[method])
        helped += all(WORSE * of_rate[name] < of_rate["AdamW2"] for name in ADDED)
        halves = ", ".join(
            f"{method} {of_mean(f'{method} at {rate:g}')} and "
            f"{of_mean(f'{method}, bf16 at {rate:g}')}"
            for method in IN_BF16
        )
        others = ", ".join(
            f"{method} {of_mean(f'{method} at {rate:g}')}"
            for method in COMBINED
            if method not in IN_BF16
        )
        findings += [
            f"At {rate:g}, test loss in float32 and under bfloat16 autocast: {halves}.",
            f"At {rate:g}, test loss: {others}.",
        ]
    total = len(COMBINED_RATES)
    sentence = (
        f"Warmup and clipping both improve AdamW2 at {helped} of {total} rates; bfloat16 changes "
        f"the loss by more than 5 % in {changed} of {total * len(IN_BF16)} set-ups."
    )
    return Verdict("measured", sentence, tuple(findings))


CLAIM = Claim(
    "12", "With what runs have already",
    "With what runs have already: half precision, warmup, clipping, rollback",
    of(_combined_variants()), _judge_combined,
)  # fmt: skip

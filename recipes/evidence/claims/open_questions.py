"""Claim 9: other normalisers, schedules, calibration and noise."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

from recipes.evidence.claim import Claim, Results, Verdict, losses, short
from recipes.evidence.runs import ADAMW2, SIGMA, STD_VIT, VIT, Variant

NORMALISERS: dict[str, dict[str, Any]] = {
    "sigma": SIGMA,
    "frobenius": dict(normaliser="frobenius"),
    "weight norm": dict(normaliser="weight_norm"),
}
NORMALISED_RATES = (1e-3, 1e-2)
SCHEDULES: dict[str, Any] = {
    # transformers' constant schedule has no warmup; its other one is linear, then constant.
    "constant": dict(lr_scheduler_type="constant_with_warmup"),
    "linear": dict(lr_scheduler_type="linear"),
    "cosine": {},
    # At 60 % of the steps, to a tenth of the rate, which it reaches in one step.
    "step": dict(lr_scheduler_type="warmup_stable_decay"),
}
SCHEDULED: dict[str, dict[str, Any]] = {
    "AdamW, warmup 10 %": dict(warmup=0.1),
    "AdamW2": ADAMW2,
    "sigmaReparam": SIGMA,
}
GENERALISATION = ("calibration_error", "noisy_accuracy")
STEP_AT, STEP_TO = 0.6, 0.1


def _open_question_variants() -> tuple[Variant, ...]:
    found = [
        Variant(f"{name}, lr {rate:g}", replace(STD_VIT, learning_rate=rate, **changes))
        for rate in NORMALISED_RATES
        for name, changes in ({"plain": {}} | NORMALISERS).items()
    ]
    for method, changes in SCHEDULED.items():
        for schedule, scheduler in SCHEDULES.items():
            settings = replace(VIT, learning_rate=3e-3, **scheduler, **changes)
            if schedule == "step":
                stable = round((STEP_AT - settings.warmup) * settings.steps)
                options = dict(num_stable_steps=stable, num_decay_steps=1, min_lr_ratio=STEP_TO)
                settings = replace(settings, lr_scheduler_kwargs=options)
            found.append(Variant(f"{method}, {schedule}", settings))
    return tuple(found)


def _judge_open_questions(results: Results) -> Verdict:
    def shown(name: str) -> str:
        runs = results[name]
        clean, noisy = (mean(run[key] for run in runs) for key in ("accuracy", "noisy_accuracy"))
        errors = [run["calibration_error"] for run in runs]
        error = "NaN" if None in errors else f"{mean(errors):.2f}"
        return (
            f"{name}: test loss {short(mean(losses(results, name)))}, calibration error {error}, "
            f"accuracy {clean:.2f}, under noise {noisy:.2f}."
        )

    best = [
        min(NORMALISERS, key=lambda name: mean(losses(results, f"{name}, lr {rate:g}")))
        for rate in NORMALISED_RATES
    ]
    wins, total = best.count("sigma"), len(NORMALISED_RATES)
    sentence = f"Of three normalisers sigma gives the lowest loss at {wins} of {total} rates."
    noise = "Noise has a standard deviation of one."
    return Verdict("measured", sentence, (noise, *map(shown, results)))


CLAIM = Claim(
    "9", "Normalisers, schedules, noise",
    "Other normalisers in sigma's place, schedules, calibration and noise",
    _open_question_variants(), _judge_open_questions, needs=frozenset(GENERALISATION),
)  # fmt: skip

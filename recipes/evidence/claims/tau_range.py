"""Claim 2: the range of tau in which runs do nearly as well as with the best one."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

from recipes.evidence.claim import (
    WORSE,
    Claim,
    Results,
    Verdict,
    losses,
    mostly_fails,
    short,
    window,
)
from recipes.evidence.claims.warmup import MODELS
from recipes.evidence.runs import Variant

TAU_VALUES = (0.001, 0.004, 0.01, 0.03, 0.1)
TAU_MODELS = ("ViT", "Swin", "GPT-2")
DECADE = 10.0


def tau_name(model: str, tau: float) -> str:
    """Return the name of a run."""
    return f"tau {tau}" if model == "ViT" else f"{model}, tau {tau}"


def _tau_variants() -> tuple[Variant, ...]:
    return tuple(
        Variant(
            tau_name(model, tau),
            replace(MODELS[model], optim="adamw2", optim_args=f"tau={tau}"),
        )
        for model in TAU_MODELS
        for tau in TAU_VALUES
    )


def _judge_tau(results: Results) -> Verdict:
    """Judge whether the loss stays within 5 % of the best over a decade of tau, on each model.

    A best tau at an end of those tried is no optimum that was seen, and one that does not train is
    none at all. The opposite is a loss that at no other tau comes within 5 %.
    """
    findings, broad, sharp = [], 0, 0
    for model in TAU_MODELS:
        by_tau = {tau: mean(losses(results, tau_name(model, tau))) for tau in TAU_VALUES}
        best = min(by_tau, key=lambda tau: by_tau[tau])
        limit = WORSE * by_tau[best]
        found = window(by_tau, limit)
        span = found[1] / found[0] if found else 1.0
        is_seen = best not in (TAU_VALUES[0], TAU_VALUES[-1])
        trains = not mostly_fails(results, tau_name(model, best))
        broad += is_seen and trains and span >= DECADE
        sharp += is_seen and trains and sum(loss <= limit for loss in by_tau.values()) == 1
        each = ", ".join(f"{short(loss)} at {tau}" for tau, loss in by_tau.items())
        findings.append(
            f"{model}: test loss {each}. The best tau is {best}"
            f"{', an end of those tried' * (not is_seen)}"
            f"{', where it mostly fails' * (not trains)}; the loss is within 5 % of it over a "
            f"factor of {span:.2g} in tau."
        )
    total = len(TAU_MODELS)
    sentence = (
        f"The loss stays within 5 % of its best over a factor of ten in tau on {broad} of {total} "
        "models."
    )
    if broad:
        word = "reproduced" if broad == total else "partly"
    else:
        word = "refuted" if sharp == total else "not at this scale"
    return Verdict(word, sentence, tuple(findings))


CLAIM = Claim(
    "2", "tau has a broad optimum",
    "A wide range of tau gives nearly the best loss (Qi et al. 2025, Figure 6)",
    _tau_variants(), _judge_tau,
)  # fmt: skip

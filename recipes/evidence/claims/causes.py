"""Claim 16: is the collapse of attention a cause of the crash, or does it go along with it?

Zhai et al. 2023 leave it open. Two kinds of runs answer in terms of interventions: some train well,
and their attention is collapsed from outside at a step in their middle; others crash, and their
attention is held up from the start, without a change to the optimizer. See `interventions`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from statistics import mean, median
from typing import Any

from recipes.evidence.claim import (
    ROWS_SPARSE,
    WORSE,
    Claim,
    Results,
    Verdict,
    failures,
    losses,
    mostly_fails,
    short,
)
from recipes.evidence.runs import GPT2, VIT, Variant
from recipes.settings import Fields, Settings

__all__ = ["CLAIMS"]

SMALL_VIT = replace(VIT, steps=100, model_config=Fields({"num_hidden_layers": 4}))
SMALL_GPT2 = replace(GPT2, steps=150, model_config=Fields({"n_layer": 3}))
SMALL_LLAMA = replace(GPT2, model="llama", steps=100, model_config=Fields({"num_hidden_layers": 3}))
"""Half as deep as those of the other claims, since there are many runs."""

TRAINS: dict[str, Settings] = {
    "ViT": replace(SMALL_VIT, learning_rate=1e-3),
    "Llama": replace(SMALL_LLAMA, learning_rate=1e-2, warmup=0.2),
    "GPT-2": replace(SMALL_GPT2, learning_rate=1e-2, warmup=0.2),
}

NO_NORMS = dict(patch="remove_pre_layernorm", learning_rate=1e-2)
CRASHES: dict[str, dict[str, Settings]] = {
    "ViT": {
        "a high rate": replace(SMALL_VIT, learning_rate=3e-2),
        "no block norms": replace(SMALL_VIT, init="default", weight_decay=0.0, **NO_NORMS),
    },
    "Llama": {"a high rate": replace(SMALL_LLAMA, learning_rate=1e-1)},
    "GPT-2": {"a high rate": SMALL_GPT2},
}

FACTORS = (2, 4, 8)
SHARP, CONTROL = "Wq, Wk", "Wv, Wo"
KINDS = {SHARP: "scale_queries_keys", CONTROL: "scale_values_outputs"}
COOL, FIRST = "temperature, logits x 16", "Wq, Wk x 8, first layer"
ALONE = "untouched"

REMEDIES: dict[str, dict[str, Any]] = {
    "logits capped at 2": dict(kind="cap_logits", limit=2.0),
    "sigma1(Wq^T Wk) clamped at 1": dict(kind="clamp_sigma", limit=1.0),
    "Wq, Wk frozen": dict(kind="freeze_queries_keys", at=1),
}
"""A logit of two changes a weight of attention by a factor of seven; sigma1 starts at about two
under xavier; the first sign comes within five steps, so that Wq and Wk are frozen from the first.
"""


def induced_name(model: str, what: str, factor: int) -> str:
    """Return the name of a run whose weights are scaled in its middle."""
    return f"{model}, {what} x {factor}"


def prevented_name(model: str, how: str, remedy: str) -> str:
    """Return the name of a run that crashes by itself, and what is done to its attention."""
    return f"{model}, {how}, {remedy}"


def _variants_of(model: str) -> tuple[Variant, ...]:
    """Return the runs of one model."""
    settings = TRAINS[model]
    at = settings.steps // 2
    given: dict[str, dict[str, Any] | None] = {f"{model}, {ALONE}": None}
    for what, kind in KINDS.items():
        for factor in FACTORS:
            given[induced_name(model, what, factor)] = dict(kind=kind, at=at, factor=factor)
    given[f"{model}, {COOL}"] = dict(kind="temperature", at=at, factor=4)
    given[f"{model}, {FIRST}"] = dict(kind=KINDS[SHARP], at=at, factor=8, layers=[0])
    found = [
        Variant(name, replace(settings, intervention=each and Fields(each)))
        for name, each in given.items()
    ]
    for how, crashing in CRASHES[model].items():
        found.append(Variant(prevented_name(model, how, ALONE), crashing))
        for remedy, fields in REMEDIES.items():
            held = replace(crashing, intervention=Fields(fields))
            found.append(Variant(prevented_name(model, how, remedy), held))
    return tuple(found)


def judge(results: Results, *, model: str) -> Verdict:
    """Judge whether what is done to attention decides whether a run is lost.

    Induced: among the factors at which a head falls below half of its largest entropy, is there one
    at which most runs fail, while most of those do not whose Wv and Wo are scaled instead? Or that
    leaves them at least worse by more than 5 % than those and than untouched ones? Prevented: of
    the set-ups that mostly fail, does one train where entropy is held above half?
    """
    is_lost, is_hurt, findings = _induced(results, model)
    crashing = saved = crashed_anyway = 0
    for how in CRASHES[model]:
        outcome, found = _prevented(results, model, how)
        findings += found
        crashing += outcome["crashes"]
        saved += outcome["saved"]
        crashed_anyway += outcome["crashed anyway"]
    more = "more" if is_hurt else "no more"
    induced = (
        "loses runs that train" if is_lost
        else f"leaves runs that train {more} than 5 % worse than the control does"
    )  # fmt: skip
    findings += [
        f"What follows: on {model} collapse from outside {induced}. Of {crashing} set-ups that "
        f"crash, {saved} train under a remedy that holds entropy above half, and in "
        f"{crashed_anyway} the loss is lost under such a "
        "remedy all the same: there the crash needs no collapse.",
        "What does not follow: that collapse was the cause in a run where nothing was done, or "
        "that other models, sizes and rates do the same.",
    ]
    sentence = (
        f"On {model} collapse from outside {induced}; entropy held up saves "
        f"{saved} of {crashing} set-ups that crash; {crashed_anyway} crash with it."
    )
    if is_lost and crashing and saved == crashing and not crashed_anyway:
        word = "reproduced"
    elif is_lost or is_hurt or saved:
        word = "partly"
    else:
        word = "refuted" if crashing and crashed_anyway == crashing else "not at this scale"
    return Verdict(word, sentence, tuple(findings))


def _induced(results: Results, model: str) -> tuple[bool, bool, list[str]]:
    """Return whether collapse from outside loses runs or leaves them worse, and the findings."""
    alone = mean(losses(results, f"{model}, {ALONE}"))
    is_lost = is_hurt = False
    findings = []
    for factor in FACTORS:
        sharp, control = (induced_name(model, what, factor) for what in KINDS)
        own, other = (mean(losses(results, name)) for name in (sharp, control))
        entropy = _entropy(results, sharp)
        if entropy < ROWS_SPARSE:
            is_lost |= mostly_fails(results, sharp) and not mostly_fails(results, control)
            is_hurt |= own > WORSE * max(alone, other)
        findings.append(
            f"{model}, Wq and Wk x {factor} at the middle: the lowest entropy share goes to "
            f"{entropy:.2f} and the test loss to {_ending(results, sharp)}. With Wv and Wo "
            f"x {factor} in their place it is {_entropy(results, control):.2f}, and the test loss "
            f"{_ending(results, control)}."
        )
    findings += [
        f"{model}, {name}: lowest entropy share {_entropy(results, f'{model}, {name}'):.2f}, test "
        f"loss {_ending(results, f'{model}, {name}')}."
        for name in (COOL, FIRST)
    ]
    worst = results[induced_name(model, SHARP, FACTORS[-1])]
    back = [run["after"]["back"] for run in worst]
    first = (
        f"{model}, untouched: test loss {_ending(results, f'{model}, {ALONE}')}; the lowest "
        f"entropy share in its middle is {median(run['before']['entropy'] for run in worst):.2f}."
    )
    last = (
        f"At x {FACTORS[-1]} the training loss goes to "
        f"{_median_text(run['after']['loss'] for run in worst)} times what it was, and is back "
        f"after {', '.join('no' if step is None else str(step) for step in back)} steps."
    )
    return is_lost, is_hurt, [first, *findings, last]


def _prevented(results: Results, model: str, how: str) -> tuple[dict[str, bool], list[str]]:
    """Return what became of a set-up that crashes where its attention was held up."""
    alone = prevented_name(model, how, ALONE)
    crashes = mostly_fails(results, alone)
    saved = crashed_anyway = False
    each = []
    for remedy in REMEDIES:
        name = prevented_name(model, how, remedy)
        is_held = median(run["lowest_entropy"] for run in results[name]) >= ROWS_SPARSE
        saved |= crashes and is_held and not mostly_fails(results, name)
        crashed_anyway |= crashes and is_held and mostly_fails(results, name)
        each.append(
            f"{remedy}: {_ending(results, name)}, lowest entropy share {_lowest(results, name)}"
        )
    outcome = {"crashes": crashes, "saved": saved, "crashed anyway": crashed_anyway}
    return outcome, [
        f"{model} with {how} {'crashes' if crashes else 'does not crash'}: test loss "
        f"{_ending(results, alone)}, lowest entropy share {_lowest(results, alone)}. "
        f"{'; '.join(each)}."
    ]


def _ending(results: Results, name: str) -> str:
    failed = failures(results, name)
    return short(mean(losses(results, name))) + (
        f" ({failed} of {len(results[name])} fail)" if failed else ""
    )


def _entropy(results: Results, name: str) -> float:
    """Return the median over runs of the lowest entropy share at the step of the intervention."""
    return median(run["after"]["entropy"] for run in results[name])


def _lowest(results: Results, name: str) -> str:
    return f"{median(run['lowest_entropy'] for run in results[name]):.2f}"


def _median_text(values: Iterable[float | None]) -> str:
    """Return the median of what may have been infinite."""
    return short(median(math.inf if value is None else value for value in values))


CLAIMS = tuple(
    Claim(
        key, f"Collapse causes the crash, {model}",
        "Attention collapse causes the crash that it goes with, which Zhai et al. 2023 leave open: "
        "collapse from outside loses runs that train, and runs that crash are saved by entropy "
        "that is held up",
        _variants_of(model), partial(judge, model=model),
    )
    for key, model in (("16", "ViT"), ("16-llama", "Llama"), ("16-gpt2", "GPT-2"))
)  # fmt: skip

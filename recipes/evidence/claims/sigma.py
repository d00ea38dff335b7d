"""Claim 6: sigmaReparam keeps entropy up and trains where the baseline does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

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
    stands_at_chance,
)
from recipes.evidence.claims.warmup import CONTROLS
from recipes.evidence.runs import NO_NORMS, SGD, SIGMA, STD_VIT, Variant
from recipes.settings import Settings

NARROW = {"num_hidden_layers": 48, "hidden_size": 32, "intermediate_size": 128}
DEEPER = dict(model_config=NARROW, batch_size=16, steps=150)
DEEP = dict(model_config={"num_hidden_layers": 24}, batch_size=16, steps=200)
SLOW = replace(STD_VIT, learning_rate=1e-3)


POST_NORM_STEPS = {12: 200, 24: 160}
"""By layers: as many as BERT has in claim 1, and as half a minute has room for."""


def _deep(layers: int, steps: int, **changes: Any) -> Settings:
    config = NARROW | {"num_hidden_layers": layers}
    settings = replace(SLOW, model_config=config, batch_size=16, steps=steps, monitor_every=20)
    return replace(settings, **changes)


PLAIN_MODEL, PATCHED, SPECTRAL = "plain", "sigmaReparam", "sigmaReparam, init spectral"


def _setup(plain: Settings, patch: str = "") -> dict[str, Settings]:
    """Return a model as it is, or without norms, and the same under sigmaReparam."""
    both = ",".join(filter(None, (patch, SIGMA["patch"])))
    return {PLAIN_MODEL: replace(plain, patch=patch), PATCHED: replace(plain, patch=both)}


def _with_spectral(kinds: dict[str, Settings]) -> dict[str, Settings]:
    return kinds | {SPECTRAL: replace(kinds[PATCHED], patch_init="spectral")}


def _post_norm(layers: int) -> Settings:
    config = NARROW | {"num_hidden_layers": layers}
    steps = POST_NORM_STEPS[layers]
    return replace(CONTROLS["BERT"], model_config=config, steps=steps, monitor_every=20)


SIGMA_SETUPS = {
    "no warmup, lr 1e-2": _setup(STD_VIT),
    "no warmup, lr 1e-2, weight decay 0.05": _setup(replace(STD_VIT, weight_decay=0.05)),
    "no block norms, lr 1e-3": _setup(SLOW, NO_NORMS),
    "no block norms, lr 1e-2": _setup(STD_VIT, NO_NORMS),
    **{
        f"SGD with momentum, lr {rate:g}": _setup(replace(STD_VIT, learning_rate=rate, **SGD))
        for rate in (1e-2, 1e-1, 1.0)
    },
    "24 layers, lr 1e-3": _setup(replace(SLOW, **DEEP)),
    "48 layers, narrow, lr 1e-3": _setup(replace(SLOW, **DEEPER)),
    "24 layers, narrow, xavier, lr 1e-3": _setup(_deep(24, 150, init="xavier")),
    "24 layers, narrow, no block norms, lr 1e-3": _with_spectral(_setup(_deep(24, 150), NO_NORMS)),
    "48 layers, narrow, no block norms, lr 1e-3": _setup(_deep(48, 150), NO_NORMS),
    "100 layers, narrow, no block norms, lr 1e-3": _with_spectral(_setup(_deep(100, 60), NO_NORMS)),
    **{
        f"post-norm BERT of {layers} layers, narrow, lr 3e-4": _setup(_post_norm(layers))
        for layers in POST_NORM_STEPS
    },
}
"""Each with one plain model. The gamma of the paper, 1, is judged; the spectral one is shown."""


class _Setup(NamedTuple):
    """What a set-up says of the claim, plain and patched."""

    plain_fails: bool
    ours_fails: bool
    is_better: bool
    plain_falls: bool
    keeps_it: bool
    ours_falls: bool
    finding: str


def _judge_sigma(results: Results) -> Verdict:
    """Judge whether sigmaReparam trains what mostly fails, and keeps the entropy that falls.

    Entropy is kept only in runs that learn: one that stands at chance has its attention untouched.
    """
    setups = [
        _judge_setup(results, name) for name in SIGMA_SETUPS if f"{name}, {PATCHED}" in results
    ]
    total, fails = len(setups), sum(each.plain_fails for each in setups)
    trains = sum(each.plain_fails and not each.ours_fails and each.is_better for each in setups)
    worse = sum(each.ours_fails and not each.plain_fails for each in setups)
    better = sum(each.is_better for each in setups)
    collapses = sum(each.plain_falls for each in setups)
    kept = sum(each.plain_falls and each.keeps_it for each in setups)
    lower = sum(each.ours_falls and not each.plain_falls for each in setups)
    sentence = (
        f"It mostly trains in {trains} of the {fails} set-ups in which the plain model mostly "
        f"fails, and keeps entropy in {kept} of the {collapses} in which plain attention falls."
    )
    findings = [
        f"sigmaReparam mostly fails in {worse} of the {total - fails} set-ups in which the plain "
        "model does not.",
        f"The loss is more than 5 % better in {better} of {total}.",
        "Entropy counts as kept where it stays above half in runs that learn something. It falls "
        f"below half under sigmaReparam in {lower} of the set-ups in which plain attention does "
        "not.",
        *(each.finding for each in setups),
    ]
    if trains and kept and trains == fails and kept == collapses and not worse:
        word = "reproduced"
    elif trains or kept:
        word = "partly"
    else:
        word = "refuted" if worse == total else "not at this scale"
    return Verdict(word, sentence, tuple(findings))


def _judge_setup(results: Results, name: str) -> _Setup:
    kinds = [f"{name}, {kind}" for kind in (PLAIN_MODEL, PATCHED)]
    plain_fails, ours_fails = (mostly_fails(results, kind) for kind in kinds)
    plain, ours = (median(losses(results, kind)) for kind in kinds)
    low, ours_low = (median(run["lowest_entropy"] for run in results[kind]) for kind in kinds)
    finding = (
        f"{name}: median test loss {short(plain)} plain and {short(ours)} with sigmaReparam, "
        f"lowest entropy share {low:.2f} and {ours_low:.2f}, failed runs "
        f"{failures(results, kinds[0])} and {failures(results, kinds[1])}."
    )
    if (other := f"{name}, {SPECTRAL}") in results:
        finding += (
            f" With init spectral {short(median(losses(results, other)))}, "
            f"{median(run['lowest_entropy'] for run in results[other]):.2f} and "
            f"{failures(results, other)} failed."
        )
    return _Setup(
        plain_fails,
        ours_fails,
        WORSE * ours < plain,
        low < ROWS_SPARSE,
        _keeps_entropy(results[kinds[1]]),
        ours_low < ROWS_SPARSE,
        finding,
    )


def _keeps_entropy(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether most of the runs learn something, and those keep entropy above half."""
    learnt = [run["lowest_entropy"] for run in runs if not stands_at_chance(run)]
    return len(learnt) > len(runs) / 2 and median(learnt) >= ROWS_SPARSE


CLAIM = Claim(
    "6", "sigmaReparam keeps entropy and trains",
    "sigmaReparam keeps entropy from collapsing and trains where the baseline does "
    "not (Zhai et al. 2023)",
    tuple(
        Variant(f"{name}, {kind}", each)
        for name, kinds in SIGMA_SETUPS.items()
        for kind, each in kinds.items()
    ),
    _judge_sigma,
    quick=tuple(f"SGD with momentum, lr 0.01, {kind}" for kind in (PLAIN_MODEL, PATCHED)),
)  # fmt: skip

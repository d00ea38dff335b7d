"""Claim 15: at how many rates today's decoder trains, with norms on queries and keys and without.

A decoder's runs at the rates of claim 17 as well are done once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recipes.evidence.claim import (
    Claim,
    Results,
    Verdict,
    failed_share,
    short,
    window,
)
from recipes.evidence.claims.picks import (
    MODELS,
    TEXT_ADAMW2,
    TEXT_RATES,
    loss_table,
    means_by_rate,
    reference_of,
)
from recipes.evidence.runs import SIGMA, Variant
from recipes.evidence.windows import Window, is_wider, window_text

DECODER_RATES = (1e-3, *TEXT_RATES, 3e-1)
"""Those of claim 17, and one on either side: windows went on beyond them, and by the four alone the
verdict was "not at this scale". The two were added for every method, and no run was made again."""

SWEEP: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, warmup": dict(warmup=0.2),
    "AdamW2": TEXT_ADAMW2,
    "sigmaReparam": SIGMA,
    "both": TEXT_ADAMW2 | SIGMA,
}
DECODERS = {
    "Llama": MODELS["Llama"],
    "Llama with QK-norm": replace(MODELS["Llama"], model="qwen3"),
}
BASES = ("AdamW", "AdamW, warmup")

LIMITS = (
    "at most that of a run that fails",
    "half of what the method takes off at its best, or more",
    "half of what the best method takes off, or more",
)
"""Which losses count as those of rates that train. Those of claim 7 would not tell methods apart:
in a hundred steps a decoder takes a fifth off the loss of knowing nothing, and no more.
"""


def decoder_name(model: str, method: str, rate: float) -> str:
    """Return the name of a run of claim 15."""
    return f"{model}: {method}, lr {rate:g}"


def _decoder_variants() -> tuple[Variant, ...]:
    return tuple(
        Variant(decoder_name(model, method, rate), replace(settings, learning_rate=rate, **changes))
        for model, settings in DECODERS.items()
        for method, changes in SWEEP.items()
        for rate in DECODER_RATES
    )


def _windows(results: Results, model: str, method: str) -> list[Window]:
    """Return the window of a method for each of `LIMITS`; none if its best rate fails."""
    by_method = {
        each: means_by_rate(results, f"{model}: {each}, lr {{:g}}", DECODER_RATES) for each in SWEEP
    }
    reference = reference_of(results)
    own = min(by_method[method].values())
    best = min(min(by_rate.values()) for by_rate in by_method.values())
    fails = failed_share(DECODERS[model].model) * reference
    if own > fails:
        return [None] * len(LIMITS)
    limits = (fails, (reference + own) / 2, (reference + best) / 2)
    return [window(by_method[method], limit) for limit in limits]


def _wider(results: Results, first: tuple[str, str], second: tuple[str, str]) -> int:
    """Return 1 if most limits say that the first window is wider, -1 if narrower, 0 otherwise."""
    pairs = list(zip(_windows(results, *first), _windows(results, *second), strict=True))
    half = len(LIMITS) / 2
    wider = sum(is_wider(own, other, DECODER_RATES) for own, other in pairs) > half
    narrower = sum(is_wider(other, own, DECODER_RATES) for own, other in pairs) > half
    return wider - narrower


def judge_decoder(results: Results) -> Verdict:
    """Judge by AdamW without warmup, as claim 7 does, on the model with query-key norms and not."""
    findings = _window_findings(results)
    ours = [method for method in SWEEP if method not in BASES]
    signs = {
        base: {
            (model, method): _wider(results, (model, method), (model, base))
            for model in DECODERS
            for method in ours
        }
        for base in BASES
    }
    for base, each in signs.items():
        compared = (
            f"{method} is {_WORDS[sign]} on {model}" for (model, method), sign in each.items()
        )
        findings.append(f"Against {base}, by two of the three limits: {'; '.join(compared)}.")
    plain, normed = ((model, BASES[0]) for model in DECODERS)
    word = _WORDS[_wider(results, normed, plain)]
    findings.append(f"QK-norm with nothing else: the window of AdamW is {word} than without it.")
    against = signs[BASES[0]].values()
    wider, narrower = (sum(sign == each for sign in against) for each in (1, -1))
    total = len(against)
    sentence = (
        f"More rates train than with AdamW in {wider} of {total} pairs of one of ours and a "
        f"Llama with or without QK-norm, fewer in {narrower}."
    )
    if wider == total:
        verdict = "reproduced"
    elif wider:
        verdict = "partly"
    else:
        verdict = "refuted" if narrower == total else "not at this scale"
    return Verdict(verdict, sentence, tuple(findings))


def _window_findings(results: Results) -> list[str]:
    """Return what the windows are, and the lowest loss of each method."""
    findings = [
        f"Rates from {DECODER_RATES[0]:g} to {DECODER_RATES[-1]:g} were tried. The window of a "
        "method is the stretch of rates whose loss, next to that of knowing nothing, is "
        f"{'; or '.join(LIMITS)}: three limits, three windows. The lowest and the highest rate "
        "were added after a first look, since windows were cut off; by the other four the verdict "
        "was "
        '"not at this scale".',
    ]
    for model in DECODERS:
        for method in SWEEP:
            by_rate = means_by_rate(results, f"{model}: {method}, lr {{:g}}", DECODER_RATES)
            best = min(by_rate, key=lambda rate: by_rate[rate])
            widths = ", ".join(
                window_text(each, DECODER_RATES) for each in _windows(results, model, method)
            )
            findings.append(
                f"{model}, {method}: the lowest test loss is {short(by_rate[best])}, at {best:g}; "
                f"the windows have a width of {widths}."
            )
    return findings


_WORDS = {1: "wider", 0: "no wider and no narrower", -1: "narrower"}


def _decoder_tables(results: Results) -> list[str]:
    lines = []
    for model in DECODERS:
        lines += [f"Test loss by rate, {model}, and how many of the runs failed:", ""]
        name = model + ": {method}, lr {rate:g}"
        lines += [*loss_table(results, list(SWEEP), DECODER_RATES, name), ""]
    return lines[:-1]


CLAIM = Claim(
    "15", "Today's decoder: more rates train",
    "On a Llama-like decoder AdamW2 and sigmaReparam widen the window of learning rates that "
    "train, with norms on queries and keys and without",
    _decoder_variants(), judge_decoder, rows=_decoder_tables,
)  # fmt: skip

"""Claim 7: how wide the windows of learning rates are, for initialisations and batch sizes."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

from recipes.evidence.claim import (
    FAILED_SHARE,
    WORSE,
    Claim,
    Results,
    Verdict,
    failures,
    losses,
    text_of,
    window,
)
from recipes.evidence.runs import ADAMW2, SHORT, SIGMA, VIT, Variant
from recipes.evidence.windows import Window, is_wider, window_text

RATES = (
    1e-4, 1.7e-4, 3e-4, 5.5e-4, 1e-3, 1.7e-3, 3e-3, 5.5e-3, 1e-2, 1.7e-2, 3e-2, 5.5e-2, 1e-1,
)  # fmt: skip
"""Four to a decade, evenly on a logarithmic scale."""

SWEEP: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, warmup": dict(warmup=0.2),
    "AdamW2": ADAMW2,
    "sigmaReparam": SIGMA,
    "both": ADAMW2 | SIGMA,
}
SWEPT_OURS = ("AdamW2", "sigmaReparam", "both")
BASES = {"AdamW": "AdamW without warmup", "AdamW, warmup": "AdamW with warmup"}
CHANGED: dict[str, dict[str, Any]] = {
    "xavier init, batch 32": {},
    "default init": dict(init="default"),
    "init x 1/4": dict(init_scale=0.25),
    "init x 4": dict(init_scale=4.0),
    "batch 8": dict(batch_size=8),
    "batch 128": dict(batch_size=128),
}
EVERY = {"xavier init, batch 32": 1, "default init": 1, "batch 128": 4}
"""Of `RATES`, which are tried under a change: every one, or every fourth; else every second."""

LIMITS = (
    "within 5 % of the method's best",
    "within 5 % of knowing nothing of it",
    "at most half of that of knowing nothing",
)
"""Which losses count as those of rates that train."""


def rates_of(change: str) -> tuple[float, ...]:
    """Return the rates that are tried under a change."""
    return RATES[:: EVERY.get(change, 2)]


def sweep_name(method: str, rate: float, change: str) -> str:
    """Return the name of a run of the sweep."""
    return f"{change}: {method}, lr {rate:g}"


def _robustness_variants() -> tuple[Variant, ...]:
    sweep = replace(VIT, steps=SHORT, monitor_every=0)
    return tuple(
        Variant(
            sweep_name(method, rate, change),
            replace(sweep, learning_rate=rate, **changes, **changed),
        )
        for change, changed in CHANGED.items()
        for method, changes in SWEEP.items()
        for rate in rates_of(change)
    )


def _windows(results: Results, method: str, change: str) -> list[Window]:
    """Return the window of a method for each of `LIMITS`.

    There is none if even the best rate does not train: at chance everywhere, all rates are within
    a few per cent of the best.
    """
    names = {rate: sweep_name(method, rate, change) for rate in rates_of(change)}
    by_rate = {rate: mean(losses(results, name)) for rate, name in names.items()}
    best, reference = min(by_rate.values()), results[names[RATES[0]]][0]["reference"]
    if best > FAILED_SHARE * reference:
        return [None] * len(LIMITS)
    limits = (WORSE * best, best + 0.05 * reference, reference / 2)
    return [window(by_rate, limit) for limit in limits]


def _compared(results: Results, method: str, base: str) -> tuple[int, int]:
    """Return under how many changes a method's windows are wider than another's, or narrower.

    They are so under a change if most of `LIMITS` say so.
    """
    wider = narrower = 0
    for change in CHANGED:
        pairs = list(
            zip(_windows(results, method, change), _windows(results, base, change), strict=True)
        )
        wider += sum(is_wider(own, other, RATES) for own, other in pairs) > len(LIMITS) / 2
        narrower += sum(is_wider(other, own, RATES) for own, other in pairs) > len(LIMITS) / 2
    return wider, narrower


def _judge_robustness(results: Results) -> Verdict:
    """Judge by AdamW without warmup: wider under all changes, under most, or narrower under all."""
    total = len(CHANGED)
    counts = {
        base: {method: _compared(results, method, base) for method in SWEPT_OURS} for base in BASES
    }
    first = next(iter(CHANGED))
    findings = [
        f"Rates from {RATES[0]:g} to {RATES[-1]:g} were tried. The window of a method is the "
        f"stretch of rates whose loss is {', or '.join(LIMITS)}: three limits, three windows.",
    ]
    for method in SWEEP:
        found = _windows(results, method, first)
        widths = ", ".join(window_text(each, RATES) for each in found)
        findings.append(f"{method}: the windows have a width of {widths} ({first}).")
    for base, name in BASES.items():
        each = "; ".join(
            f"{method} wider in {wide} and narrower in {narrow} of {total}"
            for method, (wide, narrow) in counts[base].items()
        )
        findings.append(
            f"Against {name}, over initialisations and batch sizes: {each}. A window counts as "
            "wider by two of the three limits, and by more than 10 % in decades."
        )
    each = ", ".join(f"{wide} with {method}" for method, (wide, _) in counts["AdamW"].items())
    sentence = (
        f"Of {total} initialisations and batch sizes, more rates train than with plain AdamW in "
        f"{each}."
    )
    outcomes = counts["AdamW"].values()
    if all(wider == total for wider, _ in outcomes):
        word = "reproduced"
    elif any(wider > total / 2 for wider, _ in outcomes):
        word = "partly"
    else:
        is_refuted = all(narrower == total for _, narrower in outcomes)
        word = "refuted" if is_refuted else "not at this scale"
    return Verdict(word, sentence, tuple(findings))


def _robustness_tables(results: Results) -> list[str]:
    """Return the windows of all methods, and a table of losses for each init and batch size."""
    head = [f"| | {' | '.join(SWEEP)} |", "|---" * (1 + len(SWEEP)) + "|"]
    lines = [f"Windows in which the loss is {'; '.join(LIMITS)}, below each other.", "", *head]
    for change in CHANGED:
        cells = (
            "<br>".join(
                f"{found[0]:.2g} to {found[1]:.2g}: {window_text(found, RATES)}"
                if found
                else "none"
                for found in _windows(results, method, change)
            )
            for method in SWEEP
        )
        lines.append(f"| {change} | {' | '.join(cells)} |")
    for change in CHANGED:
        lines += ["", f"Test loss by rate, {change}, and how many of the runs failed:", "", *head]
        for rate in rates_of(change):
            names = [sweep_name(method, rate, change) for method in SWEEP]
            cells = (
                text_of(losses(results, name))
                + (f", {failed} fail" if (failed := failures(results, name)) else "")
                for name in names
            )
            lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    return lines


CLAIM = Claim(
    "7", "More learning rates train",
    "Both widen the window of learning rates that train; and initialisations, batch sizes",
    _robustness_variants(), _judge_robustness, rows=_robustness_tables,
)  # fmt: skip

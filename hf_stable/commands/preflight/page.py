"""The page of a preflight: a heat map of remedies and rates before the report on all its legs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_stable.commands.preflight.judging import Outcome
from hf_stable.commands.preflight.result import PreflightResult
from hf_stable.report import write_report
from hf_stable.report.preface import Cell, Preface

__all__ = ["PAGE_FILE", "heat_map", "write_page"]

PAGE_FILE = "preflight.html"

STATES = {
    "trains": "trained",
    "spikes": "warned",
    "stalls": "failed",
    "diverges": "failed",
    "nan": "failed",
    "refused": "unknown",
    "skipped": "unknown",
}


def write_page(result: PreflightResult, output: Path) -> Path:
    """Write the page into the folder of a preflight and return its path.

    Raises:
        ModuleNotFoundError: if what the page needs is not installed.
    """
    run = [outcome.folder for outcome in result.outcomes if outcome.folder is not None]
    path = output / PAGE_FILE
    columns, rows = heat_map(result.outcomes)
    preface = Preface(
        "Preflight", result.sentences, result.command, "remedy \\ rate", columns, rows
    )
    write_report(run, path, preface=preface)
    return path


def heat_map(
    outcomes: Sequence[Outcome],
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[Cell, ...]], ...]]:
    """Return the headings and rows of a table of remedies by multiples of the rate.

    Under several seeds a cell is the worst of them, and says of how many.
    """
    factors = sorted({outcome.leg.factor for outcome in outcomes})
    names = list(dict.fromkeys(outcome.leg.remedy.name for outcome in outcomes))
    rows = []
    for name in names:
        cells = []
        for factor in factors:
            at = [o for o in outcomes if o.leg.remedy.name == name and o.leg.factor == factor]
            cells.append(_cell(at))
        rows.append((name, tuple(cells)))
    return tuple(f"x {factor:g}" for factor in factors), tuple(rows)


def _cell(outcomes: Sequence[Outcome]) -> Cell:
    if not outcomes:
        return Cell("", "unknown")
    order = list(STATES)
    run = [outcome for outcome in outcomes if outcome.is_run] or list(outcomes)
    worst = max(run, key=lambda outcome: order.index(outcome.kind))
    text = {"skipped": "not run", "nan": "NaN"}.get(worst.kind, worst.kind)
    if len(outcomes) > 1 and worst.is_run:
        text += f" ({sum(o.kind == worst.kind for o in outcomes)} of {len(outcomes)})"
    if worst.survives and worst.loss is not None:
        text += f" {worst.loss:.3g}"
    if worst.alarm is not None:
        text += f", alarm at {worst.alarm['step']}"
    return Cell(text, STATES[worst.kind])

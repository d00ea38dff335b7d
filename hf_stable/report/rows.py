"""The values of a run as tidy rows, for CSV and JSON: one value a row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hf_stable.monitor.terms import find_term
from hf_stable.report.events import Event
from hf_stable.report.run_records import Probe, RunRecords
from hf_stable.report.values import curve_points, to_number

__all__ = ["TIDY_COLUMNS", "tidy_rows"]

TIDY_COLUMNS = ("run", "attempt", "step", "quantity", "layer", "head", "value", "text")

Cells = tuple[int | None, int, str, Any, Any, float, str | None]
"""A row without the name of its run."""


def tidy_rows(run: RunRecords) -> Iterator[dict[str, Any]]:
    """Yield one row per value, with the columns `TIDY_COLUMNS`; maps are left out.

    `value` is a float, NaN where the quantity was not defined. `sec_8` is SEC(d_q, 8) of the
    layer's most concentrated head. `text` is what has no number: the mode of a map, and what an
    alarm says.
    """
    for cells in _cells(run):
        yield dict(zip(TIDY_COLUMNS, (run.name, *cells), strict=True))


def _cells(run: RunRecords) -> Iterator[Cells]:
    for record in run.history:
        for key, value in record.items():
            if key not in ("step", "epoch") and not key.startswith("stability/"):
                yield None, record["step"], key, None, None, to_number(value), None
    for probe in run.probes:
        yield from _of_probe(probe)
    for event in run.events:
        yield _of_event(event)


def _of_probe(probe: Probe) -> Iterator[Cells]:
    at = probe.attempt, probe.step
    if probe.loss is not None:
        yield *at, "loss_of_step", None, None, probe.loss, None
    for key, number in probe.numbers.items():
        yield *at, key, None, None, number, None
    for quantity, by_layer in {**probe.quantities, "effective_lr": probe.rates}.items():
        for layer, value in by_layer.items():
            if quantity == "sec_curve":
                for s, entry in curve_points(value):
                    yield *at, f"sec_{s}", layer, None, entry, None
                continue
            heads = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for head, entry in heads:
                if find_term(quantity).per == "mode":
                    yield *at, quantity, layer, head, math.nan, str(entry)
                else:
                    yield *at, quantity, layer, head, to_number(entry), None


def _of_event(event: Event) -> Cells:
    name = f"{event.name}_{event.kind}".rstrip("_")
    value = event.value if event.to_step is None else float(event.to_step)
    where = event.layer or None, event.head
    return event.attempt, event.step, name, *where, value, event.reason or None

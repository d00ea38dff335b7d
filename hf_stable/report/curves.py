"""Curves of what probes recorded: the worst head of each layer, or of a whole run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_stable.report.charts import Chart, Curve, make_chart
from hf_stable.report.run_records import RunRecords
from hf_stable.report.values import worst_head

__all__ = ["compare_runs", "layer_curves", "segments", "title_of"]


def title_of(title: str, run: RunRecords, runs: Sequence[RunRecords]) -> str:
    """Return the title of a chart of one run, which names the run where there are several."""
    return title if len(runs) == 1 else f"{run.name}: {title[0].lower()}{title[1:]}"


def layer_curves(run: RunRecords, number: int, quantity: str) -> list[Curve]:
    """Return one curve per layer: its worst head."""
    names = run.short_names
    curves = [
        Curve(f"layer {names[layer]}", segments(run.probed(quantity, layer)), number, position)
        for layer, position in run.drawn_layers.items()
    ]
    # A block without a parameter (beta of an RMSNorm) has no curve rather than one of NaN.
    return [curve for curve in curves if any(math.isfinite(y) for _, y in curve.points)]


def segments(entries: Sequence[tuple[int, int, float]]) -> list[tuple[float, float]]:
    """Return points with a gap wherever training went back."""
    points: list[tuple[float, float]] = []
    attempt = entries[0][0] if entries else 0
    for number, step, value in entries:
        if number != attempt:
            points.append((step - 0.5, math.nan))
            attempt = number
        points.append((step, value))
    return points


def compare_runs(runs: Sequence[RunRecords], quantity: str, title: str, unit: str) -> Chart:
    """Return a chart with one curve per run: the worst head of all its layers."""
    curves = []
    for number, run in enumerate(runs):
        entries = [
            (probe.attempt, probe.step, worst_head(quantity, values)[0])
            for probe in run.probes
            if (
                values := [
                    worst_head(quantity, value)[0]
                    for value in probe.quantities.get(quantity, {}).values()
                ]
            )
        ]
        curves.append(Curve(run.name, segments(entries), number))
    return make_chart(title, unit, curves, missing=f"no run recorded {quantity}")

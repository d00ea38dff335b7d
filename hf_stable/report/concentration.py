"""How many directions carry a head: SEC(d_q, s) against s, Figure 4 of Qi et al. 2025."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hf_stable.monitor.terms import SEC_VALUES
from hf_stable.report.charts import (
    ALL_RUNS,
    Axis,
    Chart,
    Curve,
    Section,
    choose_steps,
    make_chart,
    not_recorded,
)
from hf_stable.report.run_records import Probe, RunRecords
from hf_stable.report.values import curve_points

__all__ = ["concentration_section"]

PANELS = 4
"""Steps that are shown of a run."""

UNIT = "share of energy (0 to 1)"


def concentration_section(runs: Sequence[RunRecords]) -> Section:
    """Return panels at a few steps of each run, and of several runs panels that compare them."""
    charts: list[Chart] = []
    watched = [[p for p in run.probes if p.quantities.get("sec_curve")] for run in runs]
    if len(runs) > 1:
        charts += _compared(runs, watched)
    for number, (run, probes) in enumerate(zip(runs, watched, strict=True)):
        steps = [probe.step for probe in probes]
        for position in choose_steps(steps, _alarms([run]), PANELS):
            charts.append(replace(_of_layers(run, number, probes[position]), variant=run.name))
        if not probes:
            missing = not_recorded(run, "sec_curve")
            charts.append(
                replace(make_chart(run.name, UNIT, [], missing=missing), variant=run.name)
            )
    return Section(
        "concentration",
        "Where the energy of Wq\u1d40Wk is",
        "SEC(d_q, s), the share that the s largest singular values have, at s = 1, 2, 4, ... (Qi "
        "et al. 2025, Figure 4), of the most concentrated head of each layer. Energy in all "
        "directions comes up slowly; in a collapsed head a few of them hold it all.",
        tuple(charts),
        small=True,
    )


def _compared(runs: Sequence[RunRecords], watched: Sequence[Sequence[Probe]]) -> list[Chart]:
    """Return a chart for each of a few steps, in which each run has its most concentrated layer.

    A run has a curve from its first probe to its last, that of the latest probe by then; none
    where its weights were not finite there, or it had ended.
    """
    steps = sorted({probe.step for probes in watched for probe in probes})
    charts = []
    for position in choose_steps(steps, sorted(_alarms(runs)), PANELS):
        step = steps[position]
        curves = []
        for number, (run, probes) in enumerate(zip(runs, watched, strict=True)):
            past = [probe for probe in probes if probe.step <= step]
            if past and any(probe.step >= step for probe in probes):
                layers = _curves(past[-1])
                most = max(layers.values(), key=_concentration, default=[])
                curves.append(Curve(run.name, most, number))
        missing = f"at step {step} no run has finite weights"
        chart = make_chart(f"step {step}, most concentrated layer", UNIT, curves, missing=missing)
        charts.append(replace(_over_sizes(chart), variant=ALL_RUNS))
    return charts


def _of_layers(run: RunRecords, number: int, probe: Probe) -> Chart:
    names = run.short_names
    found = _curves(probe)
    curves = [
        Curve(f"layer {names[layer]}", points, number, run.drawn_layers[layer])
        for layer, points in found.items()
        if layer in run.drawn_layers
    ]
    again = f", after rollback {probe.attempt}" if probe.attempt else ""
    lost = len(probe.quantities["sec_curve"]) - len(found)
    broken = f" ({lost} of {lost + len(found)} layers not finite)" if lost and found else ""
    missing = f"at step {probe.step} the weights of no layer were finite"
    title = f"step {probe.step}{again}{broken}"
    return _over_sizes(make_chart(title, UNIT, curves, missing=missing))


def _curves(probe: Probe) -> dict[str, list[tuple[int, float]]]:
    """Return the points of each layer whose weights are finite."""
    found = {layer: curve_points(value) for layer, value in probe.quantities["sec_curve"].items()}
    return {
        layer: points
        for layer, points in found.items()
        if points and all(math.isfinite(share) for _, share in points)
    }


def _concentration(points: list[tuple[int, float]]) -> float:
    """Return SEC(d_q, 4), or that of the most values that there are."""
    return max(share for s, share in points if s <= SEC_VALUES)


def _alarms(runs: Sequence[RunRecords]) -> list[int]:
    return [event.step for run in runs for event in run.events if event.name == "alarm"]


def _over_sizes(chart: Chart) -> Chart:
    sizes = sorted({int(s) for curve in chart.curves for s, _ in curve.points})
    axis = Axis("s", "s, singular values counted", tuple(sizes))
    return replace(chart, axis=axis, limits=(0.0, 1.02))

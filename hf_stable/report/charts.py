"""Charts as data: curves over optimizer steps, their marks, and thinning. No drawing here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from hf_stable.report.run_records import RunRecords
from hf_stable.report.values import evenly

__all__ = [
    "ALL_RUNS",
    "STEPS",
    "Axis",
    "Chart",
    "Curve",
    "Mark",
    "Points",
    "Section",
    "choose_steps",
    "finish",
    "make_chart",
    "layer_label",
    "marks_of",
    "not_recorded",
    "order_layers",
    "point_limit",
    "thin",
]

Points = Sequence[tuple[float, float]]

WIDE_POINTS, SMALL_POINTS = 1000, 160
"""Points of a curve in a chart of full width, and in one of many."""

ALL_RUNS = "All runs"
"""The form of a section that compares runs."""

MOST_MARKS = 60
"""Events of a run that charts show: more are closer than an eye tells apart."""

FEWEST_POINTS = 64
"""Points that a curve keeps however many there are."""


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        label: what tells it from the others.
        points: (step, value), or the place on another `Axis` in the step's; NaN makes a gap.
        run: number of its run.
        layer: position of its layer among the run's, or None.
        style: "line", "dashed" (a bound or a ceiling), or "dotted".
    """

    label: str
    points: Points
    run: int
    layer: int | None = None
    style: Literal["line", "dashed", "dotted"] = "line"


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: an alarm, a rollback, a stop, a NaN."""

    kind: str
    step: int
    run: int
    text: str


@dataclass(frozen=True)
class Axis:
    """A horizontal axis.

    Attributes:
        name: what a point's place is called.
        title: label.
        ticks: all places that there are, on a logarithmic scale; empty for a linear scale.
    """

    name: str
    title: str
    ticks: tuple[int, ...] = ()


STEPS = Axis("step", "optimizer step")


@dataclass(frozen=True)
class Chart:
    """Curves, of most charts over optimizer steps.

    Attributes:
        title: what is shown.
        unit: label of the vertical axis, with the unit.
        curves: empty if nothing was recorded; `missing` then says why.
        variant: one of several forms of a section, of which a reader sees one at a time; or "".
        log: whether the vertical axis is logarithmic.
        missing: why there are no curves.
        marks: on the time axis.
        axis: the horizontal one.
        limits: of the vertical axis where panels are to be compared by eye; else as the data is.
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    variant: str = ""
    log: bool = False
    missing: str = ""
    marks: tuple[Mark, ...] = ()
    axis: Axis = STEPS
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Section:
    """Charts that belong together.

    Attributes:
        key: short name, for anchors and file names.
        title: heading.
        text: how to read it, one or two sentences.
        charts: its charts.
        small: whether they are small multiples.
        left_out: sentences on what is there and not drawn.
    """

    key: str
    title: str
    text: str
    charts: tuple[Chart, ...]
    small: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def variants(self) -> list[str]:
        """Return the names of its forms, in order."""
        return list(dict.fromkeys(chart.variant for chart in self.charts))


def thin(points: Points, limit: int) -> list[tuple[float, float]]:
    """Leave out points so that a plot of the rest looks the same.

    Of each of `limit` / 4 stretches the first, the smallest, the largest and the last stay, and
    one NaN if it has any: spikes and gaps survive.
    """
    if len(points) <= limit:
        return list(points)
    stretches = max(1, limit // 4)
    kept: list[tuple[float, float]] = []
    for number in range(stretches):
        start = number * len(points) // stretches
        stretch = points[start : (number + 1) * len(points) // stretches]
        finite = [i for i, (_, value) in enumerate(stretch) if math.isfinite(value)]
        chosen = {0, len(stretch) - 1}
        if finite:
            chosen.add(min(finite, key=lambda i: stretch[i][1]))
            chosen.add(max(finite, key=lambda i: stretch[i][1]))
        hole = next((i for i, (_, value) in enumerate(stretch) if not math.isfinite(value)), None)
        if hole is not None:
            chosen.add(hole)
        kept += [stretch[i] for i in sorted(chosen)]
    return kept


def choose_steps(steps: Sequence[int], alarms: Sequence[int], count: int) -> list[int]:
    """Return the positions of so many steps to show: first, last, those next to alarms, even ones.

    Args:
        steps: in the order of time, lower again after a rollback.
        alarms: steps at which something happened; they take a quarter of the room at most.
        count: how many, two or more.
    """
    if len(steps) <= count:
        return list(range(len(steps)))
    wanted = {0, len(steps) - 1}
    for alarm in alarms[: max(1, count // 4)]:
        wanted.add(min(range(len(steps)), key=lambda i: abs(steps[i] - alarm)))
    return _fill_gaps(sorted(wanted), count)


def _fill_gaps(places: Sequence[int], count: int) -> list[int]:
    """Return places, two or more, with others between them that make the widest gap narrow."""
    gaps = list(pairwise(places))
    parts = [1] * len(gaps)
    for _ in range(count - len(places)):
        widest = max(range(len(gaps)), key=lambda i: (gaps[i][1] - gaps[i][0]) / parts[i])
        parts[widest] += 1
    between = [
        start + part * (end - start) // number
        for (start, end), number in zip(gaps, parts, strict=True)
        for part in range(number)
    ]
    return [*between, places[-1]]


def layer_label(curve: Curve) -> str:
    """Return what the layer of a curve is called, without what is shown of it."""
    return curve.label.partition(":")[0]


def order_layers(charts: Iterable[Chart]) -> list[str]:
    """Return the labels of the layers of all runs by depth: a layer has one colour everywhere.

    Of runs that saw different layers, the one that saw most before a layer tells where it is.
    """
    depths: dict[str, int] = {}
    for curve in (curve for chart in charts for curve in chart.curves):
        if curve.layer is not None:
            label = layer_label(curve)
            depths[label] = max(depths.get(label, 0), curve.layer)
    return sorted(depths, key=lambda label: depths[label])


def make_chart(title: str, unit: str, curves: Iterable[Curve], *, missing: str) -> Chart:
    """Return a chart of the curves that have points, or that says why there are none."""
    kept = tuple(curve for curve in curves if curve.points)
    return Chart(title, unit, kept, missing="" if kept else missing)


def not_recorded(run: RunRecords, quantity: str) -> str:
    """Say why a run has no curve of a quantity."""
    if not run.probes:
        return f"{run.name} was not watched by a StabilityCallback"
    if any(probe.quantities.get(quantity) for probe in run.probes):
        return f"{quantity} of {run.name} was at no probe a finite number"
    return f"{run.name} did not record {quantity} (terms='all' of StabilityCallback records all)"


def point_limit(chart: Chart, small: bool) -> int:
    """Return how many points each curve of a chart may have where there is room."""
    if small:
        return SMALL_POINTS
    return 2 * SMALL_POINTS if len(chart.curves) > 6 else WIDE_POINTS


def finish(chart: Chart, small: bool, marks: Sequence[Mark], share: float = 1.0) -> Chart:
    """Thin a chart's curves and give it the marks of its runs and of its curves' gaps.

    One that is not over steps stays as it is.

    Args:
        chart: with all points.
        small: whether it is one of small multiples.
        marks: of all runs.
        share: how much of `point_limit` there is room for.
    """
    if chart.axis != STEPS:
        return chart
    shown = {curve.run for curve in chart.curves}
    gaps = () if small else _gap_marks(chart.curves)
    limit = max(FEWEST_POINTS, int(share * point_limit(chart, small)))
    return replace(
        chart,
        curves=tuple(replace(curve, points=thin(curve.points, limit)) for curve in chart.curves),
        marks=(*(mark for mark in marks if mark.run in shown), *gaps),
    )


def _gap_marks(curves: Iterable[Curve]) -> tuple[Mark, ...]:
    """Return a mark where a curve begins not to be a finite number."""
    marks = []
    for curve in curves:
        before = 0.0
        for step, value in curve.points:
            # NaN between rollbacks is put in to break the line, at the step before.
            if not math.isfinite(value) and math.isfinite(before) and step == int(step):
                text = f"{curve.label}: not a finite number from step {step:g}"
                marks.append(Mark("nan", int(step), curve.run, text))
            before = value
    return tuple(marks)


def marks_of(run: RunRecords, number: int) -> list[Mark]:
    """Return the alarms, rollbacks and stops of a run; of many the first, the last, even ones."""
    return evenly(list(_all_marks(run, number)), MOST_MARKS)


def _all_marks(run: RunRecords, number: int) -> Iterator[Mark]:
    for event in run.events:
        if event.name == "alarm":
            where = f" in {event.layer}" if event.layer else ""
            where += f", head {event.head}" if event.head is not None else ""
            text = f"{event.kind}{where}: {event.reason}"
            yield Mark(event.kind, event.step, number, text)
        elif event.name == "rollback":
            text = f"rollback to step {event.to_step}"
            yield Mark("rollback", event.step, number, text)
        elif event.name == "stop":
            yield Mark("stop", event.step, number, f"stopped: {event.reason}")

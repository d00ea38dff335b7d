"""What the page's script draws, as JSON: curves, marks and maps, rounded and without repetition."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Sequence
from typing import Any

from hf_stable._json import to_json
from hf_stable.report.charts import Chart, Mark, Section, marks_of, order_layers
from hf_stable.report.maps import MapSeries
from hf_stable.report.run_records import RunRecords

__all__ = ["DASHES", "RUN_COLOURS", "chart_payload", "map_payload"]

RUN_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6D31",
    "#7F7F7F",
)
"""Okabe and Ito's colours, which the colour-blind can tell apart, without black and yellow."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def chart_payload(runs: Sequence[RunRecords], sections: Sequence[Section]) -> str:
    """Return the runs and the curves of all charts, as JSON that may stand in a script element.

    Args:
        runs: what was read.
        sections: charts, in order.
    """
    steps: dict[tuple[float, ...], int] = {}
    charts = [chart for section in sections for chart in section.charts]
    # Nearly all charts have the alarms of their runs: these are kept with the runs, once.
    marks = [tuple(marks_of(run, number)) for number, run in enumerate(runs)]
    shared = frozenset(mark for of_run in marks for mark in of_run)
    drawn = [_chart(chart, steps, shared) for chart in charts]
    content = {
        "runs": [
            {
                "name": run.name,
                "colour": RUN_COLOURS[i % len(RUN_COLOURS)],
                "dash": DASHES[i % len(DASHES)],
                "marks": list(map(_mark, marks[i])),
            }
            for i, run in enumerate(runs)
        ],
        "layers": order_layers(charts),
        "charts": drawn,
        "steps": [list(each) for each in steps],
    }
    return _json(content)


def map_payload(maps: Sequence[Sequence[MapSeries]]) -> str:
    """Return the maps of each run's heads, as JSON that may stand in a script element."""
    return _json([[_map_series(series) for series in per_run] for per_run in maps])


def _json(content: Any) -> str:
    text = to_json(content, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _mark(mark: Mark) -> dict[str, Any]:
    return {"kind": mark.kind, "step": mark.step, "run": mark.run, "text": mark.text}


def _chart(
    chart: Chart, steps: dict[tuple[float, ...], int], shared: Collection[Mark]
) -> dict[str, Any]:
    """Return a chart with those of its marks that are its own.

    Args:
        chart: what is drawn.
        steps: places of points, which curves have in common, and their numbers; new ones go in.
        shared: marks of runs.
    """
    curves = []
    for curve in chart.curves:
        at = tuple(int(step) if step == int(step) else step for step, _ in curve.points)
        curves.append(
            {
                "label": curve.label,
                "run": curve.run,
                "layer": curve.layer,
                "style": curve.style,
                "x": steps.setdefault(at, len(steps)),
                "y": [_rounded(value) for _, value in curve.points],
            }
        )
    axis = {"name": chart.axis.name, "title": chart.axis.title, "ticks": chart.axis.ticks}
    return {
        "unit": chart.unit,
        "log": chart.log,
        "axis": axis,
        "limits": chart.limits,
        "curves": curves,
        "marks": [_mark(mark) for mark in chart.marks if mark not in shared],
    }


def _map_series(series: MapSeries) -> dict[str, Any]:
    frames = []
    for frame in series.frames:
        content = frame.content
        frames.append(
            {
                "step": frame.step,
                "attempt": frame.attempt,
                "mode": frame.mode,
                "share": _rounded(frame.share),
                "size": content.size if content else 0,
                "largest": _rounded(content.largest) if content else None,
                "levels": base64.b64encode(content.levels).decode() if content else "",
            }
        )
    return {"label": series.label, "frames": frames}


def _rounded(value: float) -> float | int | None:
    """Return four significant digits; None for what JSON has no number for."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) and abs(short) < 1e6 else short

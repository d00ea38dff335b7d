"""What a report draws, as data: sections of charts, made from the records of runs.

The page and the image files are both made from this, so they show the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_stable.report.attention_charts import entropy_section, spectra_section
from hf_stable.report.charts import Chart, Section, finish, marks_of, point_limit
from hf_stable.report.concentration import concentration_section
from hf_stable.report.loss_charts import loss_section
from hf_stable.report.run_records import MOST_LAYERS, RunRecords
from hf_stable.report.term_charts import rates_section, terms_section
from hf_stable.report.values import evenly

__all__ = ["build_sections"]

MOST_CHARTS = 60
"""Charts of a form of a section."""

MOST_CURVES = 3 * MOST_LAYERS
"""Curves of a chart: of each layer its own, a bound and a ceiling."""

MOST_POINTS = 50_000
"""Points of all charts together, some 15 bytes each on the page; more make all curves coarser."""


def build_sections(runs: Sequence[RunRecords]) -> list[Section]:
    """Return the sections of a report on these runs; sections without any curve say why."""
    whole = [
        loss_section(runs),
        entropy_section(runs),
        spectra_section(runs),
        concentration_section(runs),
        terms_section(runs),
        rates_section(runs),
    ]
    sections = [_bounded(section, runs) for section in whole]
    marks = tuple(mark for number, run in enumerate(runs) for mark in marks_of(run, number))
    num_points = sum(
        min(len(curve.points), point_limit(chart, section.small))
        for section in sections
        for chart in section.charts
        for curve in chart.curves
    )
    share = min(1.0, MOST_POINTS / max(1, num_points))
    return [
        replace(
            section,
            charts=tuple(finish(chart, section.small, marks, share) for chart in section.charts),
        )
        for section in sections
    ]


def _bounded(section: Section, runs: Sequence[RunRecords]) -> Section:
    """Return a section with as many charts and curves as can be drawn, which says what is not."""
    said = []
    for run in runs:
        count, drawn = len(run.layers), len(run.drawn_layers)
        if drawn < count and any(
            curve.layer is not None for c in section.charts for curve in c.curves
        ):
            said.append(
                f"{run.name} has {count:,} layers: {drawn} are drawn, those of alarms, of the "
                "lowest entropy and of the largest sigma1(Wq^T Wk) among them."
            )
    kept: list[Chart] = []
    for variant in section.variants:
        charts = [chart for chart in section.charts if chart.variant == variant]
        if len(charts) > MOST_CHARTS:
            said.append(f"{len(charts):,} charts are too many: {MOST_CHARTS} are drawn.")
        kept += [_with_few_curves(chart) for chart in charts[:MOST_CHARTS]]
    return replace(section, charts=tuple(kept), left_out=tuple(said))


def _with_few_curves(chart: Chart) -> Chart:
    """Return a chart with as many curves as can be drawn; its title says if these are not all."""
    count = len(chart.curves)
    if count <= MOST_CURVES:
        return chart
    title = f"{chart.title} ({MOST_CURVES} of {count:,} curves)"
    return replace(chart, title=title, curves=tuple(evenly(chart.curves, MOST_CURVES)))

"""What a report draws, as data: sections of charts, made from the records of runs.

The page and the image files are both made from this, so they show the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_stable.report.attention_charts import entropy_section, spectra_section
from hf_stable.report.charts import Section, finish, marks_of, point_limit
from hf_stable.report.concentration import concentration_section
from hf_stable.report.loss_charts import loss_section
from hf_stable.report.run_records import RunRecords
from hf_stable.report.term_charts import rates_section, terms_section

__all__ = ["build_sections"]

MOST_POINTS = 50_000
"""Points of all charts together, some 15 bytes each on the page; more make all curves coarser."""


def build_sections(runs: Sequence[RunRecords]) -> list[Section]:
    """Return the sections of a report on these runs; sections without any curve say why."""
    sections = [
        loss_section(runs),
        entropy_section(runs),
        spectra_section(runs),
        concentration_section(runs),
        terms_section(runs),
        rates_section(runs),
    ]
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

"""The page of a report: one HTML file with everything in it, which opens offline.

Text and tables are in it as HTML, so that they can be read without scripts (`assets/page.html`, a
template that escapes what runs say); charts are drawn by plotly.js from data in the page
(`assets/page.js`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import count
from typing import TYPE_CHECKING, Any

from hf_stable._wording import extra_needed
from hf_stable.report.charts import Section
from hf_stable.report.events import describe_event, some_events
from hf_stable.report.kept_batches import worst_samples
from hf_stable.report.maps import MapSeries, choose_maps
from hf_stable.report.payload import chart_payload, map_payload
from hf_stable.report.preface import Preface
from hf_stable.report.run_records import RunRecords
from hf_stable.report.summary import TABLE_COLUMNS, RunSummary, table_cells

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["build_page", "require_page_packages"]

PAGE_BYTES = 5_900_000
"""Size of a page that its maps are chosen for; the more curves there are, the fewer."""

WHAT = "the page (unlike --format json and csv)"

STATES = {
    "failed": ("\u2715", "Failed"),
    "warned": ("!", "Look"),
    "trained": ("\u2713", "Trained"),
    "unfinished": ("\u2026", "Unfinished"),
    "unknown": ("?", "Unknown"),
}
"""Sign and word on the badge of a verdict, so that its colour is not needed."""


def build_page(
    runs: Sequence[RunRecords],
    summaries: Sequence[RunSummary],
    sections: Sequence[Section],
    *,
    version: str,
    preface: Preface | None = None,
    refresh: float | None = None,
) -> str:
    """Return the whole page, with as many attention maps as there is room for.

    Args:
        runs: what was read.
        summaries: one per run.
        sections: charts, in order.
        version: of hf_stable.
        preface: what stands before the runs, or None.
        refresh: seconds after which the page loads itself anew, as long as a run goes on.

    Raises:
        ModuleNotFoundError: if plotly or jinja2 is not installed.
    """
    template = _environment().get_template("page.html")
    content = _same_on_every_page() | {
        "runs": [
            {"record": run, "summary": summary, "cells": table_cells(summary)}
            for run, summary in zip(runs, summaries, strict=True)
        ],
        "sections": sections,
        "batches": [shown for run in runs for shown in worst_samples(run)],
        "payload": chart_payload(runs, sections),
        "version": version,
        "preface": preface,
        "refresh": refresh,
    }
    room = PAGE_BYTES - len(_render(template, content, [[] for _ in runs]).encode())
    return _render(template, content, choose_maps(runs, room))


def _same_on_every_page() -> dict[str, Any]:
    # Not escaped is what is our own: scripts, the style, and JSON without "<".
    return {
        "columns": TABLE_COLUMNS,
        "states": STATES,
        "plotly_js": require_page_packages().replace("</script", "<\\/script"),
        "style": _asset("page.css"),
        "script": _asset("page.js"),
    }


def _asset(name: str) -> str:
    return (files("hf_stable.report") / "assets" / name).read_text(encoding="utf-8")


def _render(template: Any, content: Mapping[str, Any], maps: Sequence[Sequence[MapSeries]]) -> str:
    labels = dict.fromkeys(series.label for per_run in maps for series in per_run)
    return template.render(
        content,
        maps=maps,
        map_labels=labels,
        map_payload=map_payload(maps),
        # Charts are numbered through all sections, as in the payload.
        next_number=count().__next__,
    )


@cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise extra_needed(WHAT, "report", error) from error
    environment = Environment(
        loader=PackageLoader("hf_stable.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"happening": describe_event, "some": some_events}
    return environment


def require_page_packages() -> str:
    """Return the source of plotly.js, which the plotly package carries.

    Raises:
        ModuleNotFoundError: if it or jinja2 is not installed, saying how to get them.
    """
    _environment()
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise extra_needed(WHAT, "report", error) from error
    return get_plotlyjs()

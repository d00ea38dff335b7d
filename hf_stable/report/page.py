"""The page of a report: one HTML file with everything in it, which opens offline.

Text and tables are here as HTML, so that they can be read without scripts; charts are drawn by
plotly.js from data in the page (`assets/page.js`).
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Collection, Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from hf_stable._json import to_json
from hf_stable.report.charts import Chart, Mark, Section, marks_of, order_layers
from hf_stable.report.maps import MapSeries, choose_maps
from hf_stable.report.run_records import RunRecords, to_number
from hf_stable.report.summary import TABLE_COLUMNS, RunSummary, table_cells

__all__ = ["DASHES", "RUN_COLOURS", "build_page"]

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

PAGE_BYTES = 5_900_000
"""Size of a page that its maps are chosen for; the more curves there are, the fewer."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

HIDDEN = "Its run is hidden: press its name at the top to show it."

STATES = {
    "failed": ("\u2715", "Failed"),
    "warned": ("!", "Look"),
    "trained": ("\u2713", "Trained"),
    "unknown": ("?", "Unknown"),
}


def build_page(
    runs: Sequence[RunRecords],
    summaries: Sequence[RunSummary],
    sections: Sequence[Section],
    *,
    plotly_js: str,
    version: str,
) -> str:
    """Return the whole page, with as many attention maps as there is room for.

    Args:
        runs: what was read.
        summaries: one per run.
        sections: charts, in order.
        plotly_js: source of plotly.js.
        version: of hf_stable.
    """
    names = ", ".join(run.name for run in runs)
    content = {
        "TITLE": escape(f"Stability report: {names}"),
        "RUNS": escape(names),
        "STYLE": _asset("page.css"),
        "VERDICTS": "\n".join(map(_verdict, runs, summaries)),
        "TABLE": _table(summaries),
        "ALARMS": _alarms(runs),
        "NOTES": _notes(runs),
        "VERSION": escape(version),
        "PLOTLY": plotly_js.replace("</script", "<\\/script"),
        "PAYLOAD": _json(_payload(runs, sections)),
        "SCRIPT": _asset("page.js"),
    }
    html = list(_sections(sections))
    size = sum(len(text.encode()) for text in (*content.values(), *(part for _, part in html)))
    maps = choose_maps(runs, PAGE_BYTES - size)
    after = {"entropy": _map_section(runs, maps)}
    content["SECTIONS"] = "\n".join(part + after.get(key, "") for key, part in html)
    content["MAPS"] = _json([[_map_series(series) for series in per_run] for per_run in maps])
    # In one pass: what a run is called must not be taken for a place to fill.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: content[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (files("hf_stable.report") / "assets" / name).read_text(encoding="utf-8")


def _verdict(run: RunRecords, summary: RunSummary) -> str:
    sign, label = STATES[summary.verdict.state]
    sentences = "".join(f"<li>{escape(each)}</li>" for each in summary.verdict.sentences)
    return (
        f'<article class="verdict {summary.verdict.state}"><h3>'
        f'<span class="badge"><span aria-hidden="true">{sign}</span> {label}</span> '
        f"{escape(run.name)}</h3><p>{escape(summary.verdict.headline)}.</p>"
        f"<ul>{sentences}</ul></article>"
    )


def _table(summaries: Sequence[RunSummary]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in TABLE_COLUMNS)
    rows = []
    for summary in summaries:
        first, *others = map(escape, table_cells(summary))
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Comparison of runs"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _sections(sections: Sequence[Section]) -> Iterable[tuple[str, str]]:
    """Yield the key and the HTML of each section."""
    number = 0
    for section in sections:
        figures = []
        for chart in section.charts:
            figures.append(_figure(chart, number))
            number += 1
        yield (
            section.key,
            f'<section id="{section.key}"><h2>{escape(section.title)}</h2>'
            f"<p>{escape(section.text)}</p>{_variant_select(section)}"
            f'<div class="charts{" small" if section.small else ""}">{"".join(figures)}</div>'
            f'<p class="all-hidden" hidden>{HIDDEN}</p></section>',
        )


def _figure(chart: Chart, number: int) -> str:
    body = (
        f'<p class="missing">{escape(chart.missing)}</p>'
        if chart.missing
        else '<div class="plot"></div><details class="numbers"><summary>Numbers</summary></details>'
    )
    return (
        f'<figure class="chart" data-chart="{number}" data-variant="{escape(chart.variant)}">'
        f"<figcaption>{escape(chart.title)}</figcaption>{body}</figure>"
    )


def _variant_select(section: Section) -> str:
    if len(section.variants) < 2:
        return ""
    options = "".join(f"<option>{escape(name)}</option>" for name in section.variants)
    return f'<p><label>Show <select class="variant">{options}</select></label></p>'


def _map_section(runs: Sequence[RunRecords], maps: Sequence[Sequence[MapSeries]]) -> str:
    heading = '<section id="maps"><h2>Attention maps</h2>'
    if not any(maps):
        return (
            f'{heading}<p class="missing">no maps were recorded: StabilityCallback(maps="all"), or '
            "a list of heads, keeps them</p></section>"
        )
    labels = dict.fromkeys(series.label for per_run in maps for series in per_run)
    options = "".join(f"<option>{escape(label)}</option>" for label in labels)
    figures = "".join(
        f'<figure class="map" data-run="{number}"><figcaption>{escape(run.name)}</figcaption>'
        '<div class="plot"></div><p class="mode" aria-live="polite"></p></figure>'
        for number, (run, per_run) in enumerate(zip(runs, maps, strict=True))
        if per_run
    )
    return (
        f"{heading}<p>Rows are queries, columns keys, of the first sequence of the batch; long "
        "sequences are subsampled. Malignant: sparse and of low rank, all queries look at the same "
        "few keys. Benign: sparse, nearly the identity. Each map has a colour scale of its own.</p>"
        f'<p class="controls"><label>Head <select id="map-head">{options}</select></label>'
        '<label>Step <input id="map-step" type="range" min="0" value="0" step="1">'
        '<output id="map-step-value" for="map-step"></output></label></p>'
        f'<div class="charts maps">{figures}</div></section>'
    )


def _alarms(runs: Sequence[RunRecords]) -> str:
    rows = [
        f'<tr><th scope="row">{escape(run.name)}</th><td>{event.step}</td>'
        f"<td>{escape(str(event.values.get('kind', event.name)))}</td>"
        f"<td>{escape(_what_happened(event.name, event.values))}</td></tr>"
        for run in runs
        for event in run.events
    ]
    if not rows:
        return "<p>No alarm was raised.</p>"
    head = "".join(f'<th scope="col">{name}</th>' for name in ("run", "step", "kind", "what"))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Alarms"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _what_happened(name: str, values: dict[str, Any]) -> str:
    if name == "rollback":
        scale = _number(values.get("lr_scale"))
        return f"went back to step {values.get('to_step')}, rates times {scale}"
    if name == "stop":
        return str(values.get("reason", ""))
    where = f"{values['layer']}, " if values.get("layer") else ""
    where += f"head {values['head']}: " if values.get("head") is not None else ""
    found, threshold = _number(values.get("value")), _number(values.get("threshold"))
    numbers = f" ({values.get('quantity')} {found}, threshold {threshold})"
    return f"{where}{values.get('reason', '')}{numbers}. To try: {values.get('advice', '')}"


def _number(value: object) -> str:
    """Return four significant digits of a number that may be written as text."""
    return f"{to_number(value):.4g}"


def _notes(runs: Sequence[RunRecords]) -> str:
    notes = [f"<li>{escape(run.name)}: {escape(note)}</li>" for run in runs for note in run.notes]
    return f"<ul>{''.join(notes)}</ul>" if notes else "<p>All files were whole.</p>"


# Data for the script


def _json(content: Any) -> str:
    text = to_json(content, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _payload(runs: Sequence[RunRecords], sections: Sequence[Section]) -> dict[str, Any]:
    steps: dict[tuple[float, ...], int] = {}
    charts = [chart for section in sections for chart in section.charts]
    # Nearly all charts have the alarms of their runs: these are kept with the runs, once.
    marks = [tuple(marks_of(run, number)) for number, run in enumerate(runs)]
    shared = frozenset(mark for of_run in marks for mark in of_run)
    drawn = [_chart(chart, steps, shared) for chart in charts]
    return {
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

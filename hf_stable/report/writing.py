"""A report on training runs: one HTML page, images for a paper, or the data behind both."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_stable._json import to_json
from hf_stable.report.images import write_images
from hf_stable.report.maps import choose_maps
from hf_stable.report.page import build_page
from hf_stable.report.reading import read_runs
from hf_stable.report.run_records import TIDY_COLUMNS, RunRecords, tidy_rows
from hf_stable.report.sections import build_sections
from hf_stable.report.summary import RunSummary, summarise

__all__ = ["FORMATS", "WrittenReport", "require_plotly", "write_report"]

FORMATS = {
    "html": "report.html",
    "png": "report-figures",
    "json": "report.json",
    "csv": "report.csv",
}
"""Formats, and what is written if no name is given."""


@dataclass(frozen=True)
class WrittenReport:
    """What `write_report` wrote, and what it says.

    Attributes:
        files: what was written.
        summaries: one per run.
        notes: what was damaged or missing, by run.
    """

    files: tuple[Path, ...]
    summaries: tuple[RunSummary, ...]
    notes: tuple[tuple[str, str], ...]


def write_report(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = "html",
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenReport:
    """Read runs and write a report on them.

    Args:
        paths: output folders of the Trainer, or checkpoints in them; they are compared.
        output: file to write, or folder for "png"; by default as `FORMATS` says, here.
        format: "html", one page that opens offline; "png", the main figures; "json" or "csv", the
            values as one row each (`report.run_records.TIDY_COLUMNS`), maps left out; "json" has
            verdicts and notes too.
        on_run: called with (runs read, runs in all) after each.

    Raises:
        FileNotFoundError: if a run does not exist.
        ValueError: if no run is given, one holds nothing to report, or for an unknown format.
        ModuleNotFoundError: if plotly (html) or matplotlib (png) is not installed.
        OSError: if the output cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not allowed; choose one of {', '.join(FORMATS)}")
    if not paths:
        raise ValueError(
            "give at least one run: the output_dir of a Trainer, or a checkpoint in it"
        )
    plotly_js = require_plotly() if format == "html" else ""
    target = Path(FORMATS[format] if output is None else output)
    runs = read_runs(paths, on_run=on_run)
    summaries = tuple(map(summarise, runs))
    files: tuple[Path, ...] = (target,)
    if format == "png":
        files = tuple(write_images(runs, build_sections(runs), choose_maps(runs), target))
    elif format == "html":
        page = build_page(
            runs, summaries, build_sections(runs), plotly_js=plotly_js, version=version("hf-stable")
        )
        _write(target, page)
    elif format == "json":
        _write(target, to_json(_content(runs, summaries)) + "\n")
    else:
        _write_csv(target, runs)
    notes = tuple((run.name, note) for run in runs for note in run.notes)
    return WrittenReport(files, summaries, notes)


def require_plotly() -> str:
    """Return the source of plotly.js, which the plotly package carries.

    Raises:
        ModuleNotFoundError: if the package is not installed, saying how to get it.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "plotly":
            raise
        raise ModuleNotFoundError(
            "the page needs plotly, which comes with the report extra: "
            'pip install "hf-stable[report]"; --format json and csv do without',
            name=error.name,
        ) from error
    return get_plotlyjs()


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _write_csv(path: Path, runs: Sequence[RunRecords]) -> None:
    _write(path, "")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, TIDY_COLUMNS)
        writer.writeheader()
        for run in runs:
            writer.writerows(tidy_rows(run))


def _content(runs: Sequence[RunRecords], summaries: Sequence[RunSummary]) -> dict[str, Any]:
    """Return everything for JSON, the rows as lists in the order of "columns"."""
    return {
        "runs": [
            asdict(summary) | {"path": run.path, "notes": list(run.notes)}
            for run, summary in zip(runs, summaries, strict=True)
        ],
        "columns": list(TIDY_COLUMNS),
        "rows": [list(row.values()) for run in runs for row in tidy_rows(run)],
    }

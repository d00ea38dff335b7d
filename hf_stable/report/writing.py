"""A report on training runs: one HTML page, images for a paper, or the data behind both."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from hf_stable._file_names import TRAINER_STATE_FILE
from hf_stable._json import to_json
from hf_stable._whole_files import write_whole
from hf_stable.monitor.log_file import FILE_NAME
from hf_stable.report.images import require_matplotlib, write_images
from hf_stable.report.kept_batches import ShownBatches, worst_samples
from hf_stable.report.maps import choose_maps
from hf_stable.report.page import build_page, require_page_packages
from hf_stable.report.preface import Preface
from hf_stable.report.reading import read_runs
from hf_stable.report.results import RESULT_FILES
from hf_stable.report.rows import TIDY_COLUMNS, tidy_rows
from hf_stable.report.run_records import RunRecords
from hf_stable.report.sections import build_sections
from hf_stable.report.states import checkpoint_step
from hf_stable.report.summary import RunSummary, summarise

__all__ = ["FORMATS", "WrittenReport", "beside", "write_report", "write_runs"]

FORMATS = {
    "html": "report.html",
    "png": "report-figures",
    "json": "report.json",
    "csv": "report.csv",
}
"""Formats, and what is written if no name is given; beside the run."""

FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that spreadsheets compute."""

RECORDS = (TRAINER_STATE_FILE, FILE_NAME, *RESULT_FILES)
"""What a report is made from, and never takes the place of."""

REQUIRED = {"html": require_page_packages, "png": require_matplotlib}
"""What raises ModuleNotFoundError, before anything is read, if a format cannot be written."""


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
    preface: Preface | None = None,
) -> WrittenReport:
    """Read runs and write a report on them.

    Args:
        paths: output folders of the Trainer, or checkpoints in them; they are compared.
        output: file to write, or folder for "png"; by default as `FORMATS` says, beside the run:
            in its folder, or in the one that holds all of several runs.
        format: "html", one page that opens offline; "png", the main figures; "json" or "csv", the
            values as one row each (`report.run_records.TIDY_COLUMNS`), maps left out; "json" has
            verdicts, notes and the worst samples of kept batches too.
        on_run: called with (runs read, runs in all) after each.
        preface: what stands before the runs on a page; other formats leave it out.

    Raises:
        FileNotFoundError: if a run does not exist.
        ValueError: if no run is given, one holds nothing to report, for an unknown format, or if
            the output has the name of a run's own record.
        ModuleNotFoundError: if plotly and jinja2 (html) or matplotlib (png) are not installed.
        OSError: if the output cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not allowed; choose one of {', '.join(FORMATS)}")
    if not paths:
        raise ValueError(
            "give at least one run: the output_dir of a Trainer, or a checkpoint in it"
        )
    if format in REQUIRED:
        REQUIRED[format]()
    runs = read_runs(paths, on_run=on_run)
    target = beside(paths, FORMATS[format]) if output is None else Path(output)
    return write_runs(runs, target, format, preface=preface)


def write_runs(
    runs: Sequence[RunRecords],
    target: Path,
    format: str,
    *,
    preface: Preface | None = None,
    refresh: float | None = None,
) -> WrittenReport:
    """Write a report on runs that are read.

    Args:
        runs: their records.
        target: file, or folder for "png".
        format: as of `write_report`.
        preface: likewise.
        refresh: seconds after which a page loads itself anew, or None.

    Raises:
        ValueError: if the output has the name of a run's own record.
        OSError: if the output cannot be written.
    """
    if target.name in RECORDS:
        raise ValueError(
            f"{target} has the name of a record of a run, which a report is not to replace; give "
            "another name"
        )
    summaries = tuple(map(summarise, runs))
    if format == "png":
        files = tuple(write_images(runs, build_sections(runs), choose_maps(runs), target))
    else:
        files = (target,)
        with write_whole(target) as file:
            if format == "html":
                file.write(
                    build_page(
                        runs, summaries, build_sections(runs), version=version("hf-stable"),
                        preface=preface, refresh=refresh,
                    )
                )  # fmt: skip
            elif format == "json":
                file.write(to_json(_content(runs, summaries)) + "\n")
            else:
                _write_csv(file, runs)
    notes = tuple((run.name, note) for run in runs for note in run.notes)
    return WrittenReport(files, summaries, notes)


def beside(paths: Sequence[str | os.PathLike[str]], name: str) -> Path:
    """Return where a report goes that nobody named: beside its runs, and never in a checkpoint."""
    folders = [
        folder.parent if checkpoint_step(folder.name) is not None else folder
        for folder in (Path(path).resolve() for path in paths)
    ]
    place = Path(os.path.commonpath(folders))
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{place} cannot be written to: say where to with --output")
    given = Path(paths[0])
    # Said as the user said it, where it is the folder that was given.
    return (given if given.resolve() == place else place) / name


def _write_csv(file: TextIO, runs: Sequence[RunRecords]) -> None:
    writer = csv.DictWriter(file, TIDY_COLUMNS)
    writer.writeheader()
    for run in runs:
        for row in tidy_rows(run):
            writer.writerow({key: _cell(value) for key, value in row.items()})


def _cell(value: Any) -> Any:
    """Return a value as a spreadsheet is to take it: no text is a formula.

    An apostrophe in front makes it a text (OWASP, CSV injection).
    """
    is_formula = isinstance(value, str) and value.startswith(FORMULA_SIGNS)
    return f"'{value}" if is_formula else value


def _batches(shown: ShownBatches) -> dict[str, Any]:
    """Return the worst samples of an alarm as plain data, without pictures."""
    samples = [sample._asdict() for sample in shown.samples]
    for sample in samples:
        del sample["picture"]
    return {"title": shown.title, "samples": samples, "notes": list(shown.notes)}


def _content(runs: Sequence[RunRecords], summaries: Sequence[RunSummary]) -> dict[str, Any]:
    """Return everything for JSON, the rows as lists in the order of "columns"."""
    return {
        "runs": [
            asdict(summary)
            | {
                "path": run.path,
                "notes": list(run.notes),
                "batches": list(map(_batches, worst_samples(run))),
            }
            for run, summary in zip(runs, summaries, strict=True)
        ],
        "columns": list(TIDY_COLUMNS),
        "rows": [list(row.values()) for run in runs for row in tidy_rows(run)],
    }

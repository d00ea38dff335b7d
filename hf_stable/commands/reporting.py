"""`hf-stable report`: one page on what happened in runs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_stable._wording import printable
from hf_stable.commands.conventions import NO, SUCCESS, Debug, Json, Wide, examples
from hf_stable.commands.terminal import (
    indented,
    make_console,
    make_table,
    print_json,
    show_progress,
    tell_waiting,
)

if TYPE_CHECKING:
    from hf_stable.report.writing import WrittenReport

__all__ = ["room"]

LEAST = (
    "rollbacks", "alarms", "divergence step", "time", "best loss", "max sigma1(Wq^T Wk)",
    "min entropy (nats)", "accuracy",
)  # fmt: skip
"""Columns that a narrow terminal does without, the least important first."""

room = typer.Typer()


@room.command(
    epilog=examples(
        "hf-stable report runs/first",
        "hf-stable report runs/first runs/second --output report.html",
        "hf-stable report runs/first --format png --output figures",
        "hf-stable report --follow runs/first",
    )
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The Trainer's output folders.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; a folder for png. By default beside the run."),
    ] = None,
    format: Annotated[
        str, typer.Option(help="html, one page that opens offline; png, json or csv.")
    ] = "html",
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Write the page anew as the runs go on, until all ended."),
    ] = False,
    every: Annotated[float, typer.Option(help="Seconds from look to look of --follow.")] = 10.0,
    wide: Wide = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Show on one page what happened in runs, and why.

    Reads trainer_state.json and the stability.jsonl of StabilityCallback; a checkpoint stands for
    the run up to it. What is damaged or missing is said and left out. Exit code 1 if a run failed.
    """
    from hf_stable.report import write_report

    if follow:
        written = _follow(runs, output, format, every)
    else:
        with show_progress("Reading runs") as on_run:
            written = write_report(runs, output, format=format, on_run=on_run)
    if as_json:
        rows = [
            asdict(row) | {"notes": [note for run, note in written.notes if run == row.run]}
            for row in written.summaries
        ]
        print_json({"files": list(map(str, written.files)), "runs": rows})
    else:
        _print_report(written, wide)
    failed = any(row.verdict.state == "failed" for row in written.summaries)
    return NO if failed else SUCCESS


def _follow(runs: list[Path], output: Path | None, format: str, every: float) -> WrittenReport:
    from hf_stable.report.following import follow_report

    if format != "html":
        raise ValueError(f"--follow writes a page: leave out --format {format}")
    told: set[str] = set()

    def on_written(written: WrittenReport) -> None:
        # Where the page is, is said once, and what is new in its verdicts.
        said = [
            str(written.files[0]),
            *(f"{s.run}: {s.verdict.headline}" for s in written.summaries),
        ]
        for line in said:
            if line not in told:
                print(printable(line), file=sys.stderr, flush=True)
        told.update(said)

    return follow_report(runs, output, every=every, on_written=on_written, on_waiting=tell_waiting)


def _print_report(written: WrittenReport, wide: bool) -> None:
    """Print a row for each run, what led to its verdict, and what was written."""
    from hf_stable.report.summary import TABLE_COLUMNS, table_cells

    console = make_console(wide=wide)
    table = make_table(*TABLE_COLUMNS, least=LEAST)
    for row in written.summaries:
        table.add_row(*table_cells(row))
    console.print(table)
    for row in written.summaries:
        console.print(f"{row.run}: {row.verdict.headline}.")
        if row.verdict.state in ("failed", "warned"):
            console.print(*indented(row.verdict.sentences), sep="")
    for run, note in written.notes:
        console.print(f"{run}: {note}")
    console.print(*written.files, sep="\n")

"""`hf-stable demo` on the command line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hf_stable.commands.conventions import NO, SUCCESS, Debug, Json, Wide, examples
from hf_stable.commands.terminal import make_console, make_table, print_json

if TYPE_CHECKING:
    from hf_stable.commands.demo.parts import DemoPart
    from hf_stable.commands.demo.results import DemoResult
    from hf_stable.commands.demo.runs import DemoRun, RunResult

__all__ = ["room"]

room = typer.Typer()


@room.command(
    epilog=examples("hf-stable demo", "hf-stable demo --quick --output demo-output --json")
)
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the model, the runs' logs and results.json.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Seed of split, weights and data order.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: see that it works, claim nothing.")
    ] = False,
    wide: Wide = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Train without warmup, save folded, reload: digits, on CPU.

    Trains a small ViT at a high learning rate with and without sigmaReparam, and with AdamW (with
    and without warmup, and at a lower rate) and AdamW2. Saves the patched model folded and reloads
    it with stock transformers in a new process. About two minutes on two cores. Exit code 0 only
    if the reload agrees and, without --quick, the patched run and the AdamW2 run beat the plain
    ones.
    """
    from hf_stable.commands.demo.course import run_demo

    console = make_console(wide=wide)

    def announce(run: DemoRun) -> None:
        print(f"Training: {run.name}", file=sys.stderr, flush=True)

    def show(part: DemoPart, results: Sequence[RunResult]) -> None:
        if not as_json:
            console.print(part.title, _make_table(results), "", sep="\n")

    # The Trainer prints its log lines: they are progress, not the result.
    with contextlib.redirect_stdout(sys.stderr):
        result = run_demo(output, seed=seed, quick=quick, on_run=announce, on_part=show)
    print_json(result.to_dict()) if as_json else _print_result(result)
    return SUCCESS if result.passed else NO


def _make_table(results: Sequence[RunResult]) -> Table:
    """Return the runs of one part, one per row."""
    table = make_table("run", "test loss", "accuracy", "min sigma", "min gamma", "seconds")
    for row in results:
        gamma = "-" if row.gamma is None else f"{row.gamma:.3f}"
        figures = (f"{row.loss:.3f}", f"{row.accuracy:.1%}", f"{row.sigma:.3f}", gamma)
        table.add_row(row.name, *figures, f"{row.seconds:.1f}")
    return table


def _print_result(result: DemoResult) -> None:
    console = make_console()
    for finding in result.findings:
        console.print(f"- {finding}")
    if result.quick:
        console.print("- Quick: too few steps to compare the runs, so nothing is claimed.")
    console.print(f"{result.seconds:.0f} s in all; model and results are in {result.output}")
    console.print(f"What happened in each run, with charts: {result.report}")

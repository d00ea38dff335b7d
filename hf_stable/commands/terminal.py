"""How results look: tables on a terminal, plain text without colour or wrapping in a pipe, JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import Progress
from rich.table import Table

from hf_stable._json import as_json_value

if TYPE_CHECKING:
    from hf_stable.commands.demo.runs import RunResult
    from hf_stable.commands.doctor import Diagnosis
    from hf_stable.commands.inspect.blocks import BlockSpectrum
    from hf_stable.commands.inspect.comparison import CheckpointComparison
    from hf_stable.commands.inspect.inspection import CheckpointReport

__all__ = [
    "demo_table",
    "indented",
    "make_console",
    "make_table",
    "print_comparison",
    "print_diagnosis",
    "print_inspection",
    "print_json",
    "show_progress",
]


def make_console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr that takes text as it is."""
    # A pipe has no width: nothing is wrapped or cut there.
    file = sys.stderr if stderr else sys.stdout
    width = None if file.isatty() else 100_000
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def make_table(*columns: str) -> Table:
    """Return a table with lines on a terminal and with spaces elsewhere."""
    lines = box.HEAVY_HEAD if sys.stdout.isatty() else None
    table = Table(box=lines, pad_edge=lines is not None)
    for column in columns:
        table.add_column(column)
    return table


def indented(sentences: Sequence[str]) -> list[Padding]:
    """Return sentences that are printed indented, also where a terminal wraps them."""
    return [Padding.indent(sentence, 2) for sentence in sentences]


def demo_table(results: Sequence[RunResult]) -> Table:
    """Return the runs of one part of the demo, one per row."""
    table = make_table("run", "test loss", "accuracy", "min sigma", "min gamma", "seconds")
    for row in results:
        gamma = "-" if row.gamma is None else f"{row.gamma:.3f}"
        figures = (f"{row.loss:.3f}", f"{row.accuracy:.1%}", f"{row.sigma:.3f}", gamma)
        table.add_row(row.name, *figures, f"{row.seconds:.1f}")
    return table


def print_inspection(report: CheckpointReport) -> None:
    """Print the matrices of a checkpoint, one per row."""
    patched = report.kind != "plain"
    console = make_console()
    columns = ("layer", "shape", "dtype", "sigma", "stable rank")
    table = make_table(*columns, *(("gamma", "raw sigma") * patched))
    for layer in report.layers:
        cells = [_shape(layer.shape), layer.dtype, layer.note or _numbers(layer.sigma)]
        cells.append(_numbers(layer.stable_rank))
        if patched:
            cells += [_numbers(layer.gamma), _numbers(layer.raw_sigma)]
        table.add_row(layer.name, *cells)
    console.print(f"{report.path} ({report.kind})", table, "", sep="\n")
    if report.blocks:
        console.print("Wq^T Wk of each head", _block_table(report.blocks), "", sep="\n")
    if report.norms:
        norms = make_table("norm", "l2 norm of its gain", "largest entry")
        for norm in report.norms:
            norms.add_row(norm.name, _number(norm.norm), _number(norm.largest))
        console.print("Norms", norms, "", sep="\n")
    if report.blocks_note:
        console.print(f"No heads and norms: {report.blocks_note}")
    console.print(f"{len(report.layers)} matrices, {report.num_parameters:,} parameters")
    console.print(f"{report.verdict}.")
    for sign in report.signs:
        console.print(f"- {sign}")
    if report.problem:
        console.print(f"Problem: {report.problem}")


def _block_table(blocks: Sequence[BlockSpectrum]) -> Table:
    table = make_table("block", "sigma1", "SEC(d_q, 4)", "stable rank")
    for block in blocks:
        if block.finite:
            cells = [_numbers(block.sigma_qk), _numbers(block.sec), _numbers(block.stable_rank)]
        else:
            cells = ["has NaN or infinite entries", "", ""]
        table.add_row(block.name, *cells)
    return table


def print_comparison(report: CheckpointComparison) -> None:
    """Print how two checkpoints differ, the most changed first."""
    console = make_console()
    console.print(f"{report.paths[0]} -> {report.paths[1]}")
    table = make_table("layer", "distance", "sigma before", "sigma after")
    for change in report.matrices:
        table.add_row(change.name, *map(_number, (change.distance, *change.sigma)))
    console.print("Matrices, the most changed first", table, "", sep="\n")
    if report.vectors:
        vectors = make_table("gain or bias", "distance", "norm before", "norm after")
        for vector in report.vectors:
            vectors.add_row(vector.name, *map(_number, (vector.distance, *vector.norm)))
        console.print("Gains and biases, the most changed first", vectors, "", sep="\n")
    if report.heads:
        heads = make_table("block", "head", "sigma1(Wq^T Wk)", "SEC(d_q, 4)")
        for head in report.heads:
            pairs = [" -> ".join(f"{v:.4g}" for v in pair) for pair in (head.sigma_qk, head.sec)]
            heads.add_row(head.block, str(head.head), *pairs)
        console.print("Heads, the most grown first", heads, "", sep="\n")
    if report.reshaped:
        reshaped = make_table("tensor", "shape before", "shape after")
        for each in report.reshaped:
            reshaped.add_row(each.name, *map(_shape, each.shape))
        console.print("Of another shape, and so not compared", reshaped, "", sep="\n")
    for label, names in (("first", report.only_first), ("second", report.only_second)):
        if names:
            console.print(f"Only in the {label}: {', '.join(names)}")
    console.print("The weights are the same." if report.is_same else "The weights differ.")


def print_diagnosis(report: Diagnosis) -> None:
    """Print versions, changes and what is supported."""
    console = make_console()
    versions = make_table("package", "installed", "needed", "verdict")
    for row in report.packages:
        versions.add_row(row.name, row.installed or "not installed", row.needed, row.verdict)
    console.print("Versions", versions, "", sep="\n")
    changes = make_table("what", "by", "in place", "why")
    for change in report.changes:
        in_place = "yes" if change.active else "no"
        changes.add_row(change.target, change.made_by, in_place, change.reason)
    console.print("What hf_stable changes in a process, by what", changes, "", sep="\n")
    for name, values in report.supported.items():
        console.print(f"{name}: {', '.join(values)}")


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def print_json(content: dict[str, Any]) -> None:
    """Print plain data for a machine; NaN and infinity as null, which JSON has no numbers for."""
    print(json.dumps(as_json_value(content), indent=2, allow_nan=False))


@contextlib.contextmanager
def show_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal's stderr; what is yielded moves it, called with (done, total)."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

"""How the findings of `hf-stable inspect` look on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from hf_stable.commands.inspect.blocks import BlockSpectrum
from hf_stable.commands.inspect.comparison import CheckpointComparison
from hf_stable.commands.inspect.inspection import CheckpointReport
from hf_stable.commands.terminal import make_console, make_table

__all__ = ["print_comparison", "print_inspection"]


def print_inspection(report: CheckpointReport, *, wide: bool = False) -> None:
    """Print the matrices of a checkpoint, one per row."""
    patched = report.kind != "plain"
    console = make_console(wide=wide)
    columns = ("layer", "shape", "dtype", "sigma", "stable rank")
    least = ("dtype", "raw sigma", "shape", "stable rank")
    table = make_table(*columns, *(("gamma", "raw sigma") * patched), least=least)
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


def print_comparison(report: CheckpointComparison, *, wide: bool = False) -> None:
    """Print how two checkpoints differ, the most changed first."""
    console = make_console(wide=wide)
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


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)

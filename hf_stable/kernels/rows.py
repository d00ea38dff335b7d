"""The rows of the tables that the head of a call points to, and where its chunks keep results."""

from __future__ import annotations

from typing import Any

from numba import njit

from hf_stable.kernels import tables as t
from hf_stable.kernels.entries import COMPILED
from hf_stable.kernels.pointers import doubles, integers

__all__ = [
    "batch_at",
    "chunk_at",
    "norm_at",
    "option_of",
    "part_at",
    "piece_at",
    "products_of",
    "share_at",
    "sums_of",
    "value_at",
    "weight_at",
]


@njit(**COMPILED)
def weight_at(head: Any, index: Any) -> Any:
    """Return a row of the table of weights."""
    return integers(head[t.WEIGHTS] + 8 * t.WEIGHT_SIZE * index)


@njit(**COMPILED)
def chunk_at(head: Any, index: Any) -> Any:
    """Return a row of the table of chunks."""
    return integers(head[t.CHUNKS] + 8 * t.CHUNK_SIZE * index)


@njit(**COMPILED)
def piece_at(head: Any, index: Any) -> Any:
    """Return a row of the table of pieces."""
    return integers(head[t.PIECES] + 8 * t.PIECE_SIZE * index)


@njit(**COMPILED)
def part_at(head: Any, index: Any) -> Any:
    """Return a row of the table of parts."""
    return integers(head[t.PARTS] + 8 * t.PART_SIZE * index)


@njit(**COMPILED)
def batch_at(head: Any, index: Any) -> Any:
    """Return a row of the table of batches."""
    return integers(head[t.BATCHES] + 8 * t.BATCH_SIZE * index)


@njit(**COMPILED)
def share_at(head: Any, index: Any) -> Any:
    """Return a row of the table of shares."""
    return integers(head[t.SHARES] + 8 * t.SHARE_SIZE * index)


@njit(**COMPILED)
def option_of(head: Any, weight: Any) -> Any:
    """Return the options of a weight's group."""
    return doubles(head[t.OPTIONS] + 8 * t.OPTION_SIZE * weight[t.GROUP])


@njit(**COMPILED)
def value_at(head: Any, index: Any) -> Any:
    """Return the values of a part."""
    return doubles(head[t.VALUES] + 8 * t.VALUE_SIZE * index)


@njit(**COMPILED)
def norm_at(head: Any, index: Any) -> Any:
    """Return what a chunk keeps: see `tables.NORMS`."""
    return doubles(head[t.NORMS] + 16 * index)


@njit(**COMPILED)
def sums_of(head: Any, chunk: Any, matrix: Any) -> Any:
    """Return the address of what a chunk adds to `z`: as many numbers as its rows have entries."""
    return head[t.SUMS] + (matrix * head[t.AREA_OF_SUMS] + chunk[t.SUM_AT]) * head[t.REAL_SIZE]


@njit(**COMPILED)
def products_of(head: Any, chunk: Any, matrix: Any, index: Any) -> Any:
    """Return the address of `W v`, a number for each row of a chunk, for a piece of its rows."""
    start = chunk[t.PRODUCT_AT] + (index - chunk[t.PIECE]) * (chunk[t.END_ROW] - chunk[t.ROW])
    return head[t.PRODUCTS] + (matrix * head[t.AREA_OF_PRODUCTS] + start) * head[t.REAL_SIZE]

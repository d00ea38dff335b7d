"""Loops over entries of tensors, in which all the time is spent: what numba turns into vector code.

A pointer of the kind of the entries and one of the kind of the arithmetic stand for dtypes.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float64, njit

from hf_stable.kernels.pointers import at, cast, narrow, widen

__all__ = [
    "COMPILED",
    "clear",
    "dot",
    "iterate_four",
    "iterate_row",
    "move_entries",
    "move_moments",
    "sum_squares",
]

UNWRAPPED: dict[str, Any] = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Nobody calls these functions from Python: without what that takes they are compiled faster."""

VECTOR: dict[str, Any] = dict(error_model="numpy", fastmath={"nsz", "arcp", "contract", "reassoc"})
"""NaN and infinity have meanings here, so `nnan` and `ninf` are left out."""

COMPILED: dict[str, Any] = VECTOR | UNWRAPPED


@njit(**COMPILED)
def clear(numbers: Any, count: Any) -> None:
    """Set numbers to zero."""
    zero = cast(0.0, numbers)
    for j in range(count):
        numbers[j] = zero


@njit(**COMPILED)
def sum_squares(entries: Any, count: Any, real: Any) -> Any:
    """Return the sum of the squares of entries."""
    total = cast(0.0, real)
    for j in range(count):
        x = widen(entries[j])
        total += x * x
    return float64(total)


@njit(**COMPILED)
def move_moments(grad: Any, first: Any, second: Any, update: Any, count: Any, factors: Any) -> None:
    """Move the moments and write Adam's update (Algorithm 1, lines 3 to 5)."""
    sign, new_first, keep_second, new_second, first_scale, root_scale, eps = factors
    for j in range(count):
        g = sign * widen(grad[j])
        m = widen(first[j])
        m += (g - m) * new_first
        s = widen(second[j]) * keep_second + new_second * g * g
        first[j] = narrow(m, first)
        second[j] = narrow(s, second)
        update[j] = m * first_scale / (math.sqrt(s) * root_scale + eps)


@njit(**COMPILED)
def move_entries(weight: Any, update: Any, count: Any, keep: Any, rate: Any) -> None:
    """Step entries: `W <- keep W - rate U` (lines 10 to 14)."""
    for j in range(count):
        weight[j] = narrow(widen(weight[j]) * keep - rate * update[j], weight)


@njit(**COMPILED)
def dot(entries: Any, v: Any, count: Any) -> Any:
    """Return the product of entries with a vector."""
    total = cast(0.0, v)
    for j in range(count):
        total += widen(entries[j]) * v[j]
    return total


@njit(**COMPILED)
def iterate_row(row: Any, count: Any, v: Any, z: Any, y: Any) -> None:
    """`y = W v` and `z += W.T y` for one row of W, which is read from memory once."""
    total = dot(row, v, count)
    for j in range(count):
        z[j] += total * widen(row[j])
    y[0] = total


@njit(**COMPILED)
def iterate_four(first: Any, stride: Any, count: Any, v: Any, z: Any, y: Any, like: Any) -> None:
    """As `iterate_row`, for four rows that read v and z but once."""
    a, b = at(first, like), at(first + stride, like)
    c, d = at(first + 2 * stride, like), at(first + 3 * stride, like)
    y0 = y1 = y2 = y3 = cast(0.0, v)
    for j in range(count):
        x = v[j]
        y0 += widen(a[j]) * x
        y1 += widen(b[j]) * x
        y2 += widen(c[j]) * x
        y3 += widen(d[j]) * x
    for j in range(count):
        z[j] += y0 * widen(a[j]) + y1 * widen(b[j]) + y2 * widen(c[j]) + y3 * widen(d[j])
    y[0] = y0
    y[1] = y1
    y[2] = y2
    y[3] = y3

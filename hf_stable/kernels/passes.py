"""The passes over weights: row by row, on any number of threads.

A chunk is a range of rows of one weight. What it adds to `z = W.T (W v)` is kept apart and summed
in the order of the chunks, so results depend neither on the number of threads nor on which of them
took a chunk.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float64, njit

from hf_stable.kernels import tables as t
from hf_stable.kernels.entries import (
    COMPILED,
    clear,
    dot,
    iterate_four,
    iterate_row,
    move_entries,
    move_moments,
    sum_squares,
)
from hf_stable.kernels.pointers import at, cast, doubles, halves, integers, singles
from hf_stable.kernels.rows import (
    chunk_at,
    norm_at,
    option_of,
    part_at,
    piece_at,
    products_of,
    sums_of,
    value_at,
    weight_at,
)

__all__ = ["work_bfloat16", "work_float32", "work_float64"]


@njit(**COMPILED)
def _iterate_rows(
    head: Any, chunk: Any, matrix: Any, rows: Any, address: Any, wanted: bool,
    like: Any, real: Any,
) -> None:  # fmt: skip
    """Add rows of a chunk to its sums, piece by piece.

    Args:
        head: of the call.
        chunk: its row in the table.
        matrix: `OF_WEIGHT` or `OF_UPDATE`.
        rows: the first, and the first after them.
        address: of the first row.
        wanted: whether to leave out parts that are not wanted.
        like: a pointer of the kind of the entries.
        real: a pointer of the kind of the vectors.
    """
    weight = weight_at(head, chunk[t.OWNER])
    real_size = head[t.REAL_SIZE]
    size = real_size if matrix == t.OF_UPDATE else head[t.SIZE]
    vectors = weight[t.UPDATE_V] if matrix == t.OF_UPDATE else weight[t.WEIGHT_V]
    stride = weight[t.WIDTH] * size
    for index in range(chunk[t.PIECE], chunk[t.END_PIECE]):
        piece = piece_at(head, index)
        if wanted and not (part_at(head, piece[t.PART])[t.WANTED] >> matrix) & 1:
            continue
        count = piece[t.END_COLUMN] - piece[t.COLUMN]
        v = at(vectors + part_at(head, piece[t.PART])[t.V_AT] * real_size, real)
        z = at(sums_of(head, chunk, matrix) + piece[t.COLUMN] * real_size, real)
        products = products_of(head, chunk, matrix, index) + (rows[0] - chunk[t.ROW]) * real_size
        first = address + piece[t.COLUMN] * size
        row, end = 0, rows[1] - rows[0]
        while row + 4 <= end and not _goes_alone(count):
            y = at(products + row * real_size, real)
            iterate_four(first + row * stride, stride, count, v, z, y, like)
            row += 4
        while row < end:
            y = at(products + row * real_size, real)
            iterate_row(at(first + row * stride, like), count, v, z, y)
            row += 1


@njit(**COMPILED)
def _goes_alone(count: Any) -> bool:
    """Say whether a row fills the first cache: four of them at once would push each other out.

    A row that does not fit has to come from the second cache anyway, and four share v and z.
    """
    return t.TILE // 4 < count <= t.TILE


@njit(**COMPILED)
def _rows_from(chunk: Any, weight: Any, row: Any) -> Any:
    """Return the rows of a chunk, from one on, that are worked on at once."""
    width = weight[t.WIDTH]
    number = 1 if _goes_alone(width) else max(4, t.TILE // width // 4 * 4)
    return row, min(row + number, chunk[t.END_ROW])


@njit(**COMPILED)
def _factors(weight: Any, option: Any, real: Any) -> Any:
    """Return what `_move_moments` multiplies with at the step that a weight is at."""
    step = float64(singles(weight[t.STEP])[0])
    return (
        cast(option[t.SIGN], real),
        cast(1 - option[t.BETA1], real),
        cast(option[t.BETA2], real),
        cast(1 - option[t.BETA2], real),
        cast(1 / (1 - option[t.BETA1] ** step), real),
        cast(1 / math.sqrt(1 - option[t.BETA2] ** step), real),
        cast(option[t.EPS], real),
    )


@njit(**COMPILED)
def _look(head: Any, chunk: Any, entry: Any, real: Any) -> Any:
    """Return the product of a chunk's first row with the vector, and the square of that row."""
    weight, piece = weight_at(head, chunk[t.OWNER]), piece_at(head, chunk[t.PIECE])
    count = piece[t.END_COLUMN] - piece[t.COLUMN]
    first = weight[t.PARAM] + (chunk[t.ROW] * weight[t.WIDTH] + piece[t.COLUMN]) * head[t.SIZE]
    v = at(weight[t.WEIGHT_V] + part_at(head, piece[t.PART])[t.V_AT] * head[t.REAL_SIZE], real)
    row = at(first, entry)
    return float64(dot(row, v, count)), sum_squares(row, count, real)


@njit(**COMPILED)
def _update_chunk(head: Any, index: Any, entry: Any, real: Any) -> None:
    """Moments and update of some rows, and an iteration on the update in the same pass.

    Likewise one on the weight, unless the last step has made it ahead.
    """
    chunk, norms = chunk_at(head, index), norm_at(head, index)
    weight = weight_at(head, chunk[t.OWNER])
    width, size = weight[t.WIDTH], head[t.SIZE]
    factors = _factors(weight, option_of(head, weight), real)
    if weight[t.IS_AHEAD]:
        product, square = _look(head, chunk, entry, real)
        if not abs(product - norms[t.OF_WEIGHT]) <= 1e-5 * math.sqrt(square):
            weight[t.IS_STALE] = 1  # changed through `.data`, which leaves no other trace
    clear(at(sums_of(head, chunk, t.OF_UPDATE), real), width)
    clear(at(sums_of(head, chunk, t.OF_WEIGHT), real), width)
    square = square_of_update = 0.0
    row = chunk[t.ROW]
    while row < chunk[t.END_ROW]:
        rows = _rows_from(chunk, weight, row)
        count, offset = (rows[1] - row) * width, row * width * size
        param = weight[t.PARAM] + offset
        grad, first = at(weight[t.GRAD] + offset, entry), at(weight[t.FIRST] + offset, entry)
        second = at(weight[t.SECOND] + offset, entry)
        update = head[t.UPDATES] + (weight[t.UPDATE_AT] + row * width) * head[t.REAL_SIZE]
        move_moments(grad, first, second, at(update, real), count, factors)
        if weight[t.IS_VECTOR]:
            square_of_update += sum_squares(at(update, real), count, real)
            square += sum_squares(at(param, entry), count, real)
        else:
            _iterate_rows(head, chunk, t.OF_UPDATE, rows, update, False, real, real)
            if not weight[t.IS_AHEAD]:
                _iterate_rows(head, chunk, t.OF_WEIGHT, rows, param, False, entry, real)
        row = rows[1]
    if weight[t.IS_VECTOR]:
        norms[t.OF_WEIGHT], norms[t.OF_UPDATE] = square, square_of_update


@njit(**COMPILED)
def _iterate_chunk(head: Any, index: Any, entry: Any, real: Any) -> None:
    """One more iteration on the parts that are wanted, of weights and of updates."""
    chunk = chunk_at(head, index)
    weight = weight_at(head, chunk[t.OWNER])
    wanted = 0
    for piece in range(chunk[t.PIECE], chunk[t.END_PIECE]):
        wanted |= part_at(head, piece_at(head, piece)[t.PART])[t.WANTED]
    rows, offset = (chunk[t.ROW], chunk[t.END_ROW]), chunk[t.ROW] * weight[t.WIDTH]
    if wanted >> t.OF_WEIGHT & 1:
        clear(at(sums_of(head, chunk, t.OF_WEIGHT), real), weight[t.WIDTH])
        param = weight[t.PARAM] + offset * head[t.SIZE]
        _iterate_rows(head, chunk, t.OF_WEIGHT, rows, param, True, entry, real)
    if wanted >> t.OF_UPDATE & 1:
        clear(at(sums_of(head, chunk, t.OF_UPDATE), real), weight[t.WIDTH])
        update = head[t.UPDATES] + (weight[t.UPDATE_AT] + offset) * head[t.REAL_SIZE]
        _iterate_rows(head, chunk, t.OF_UPDATE, rows, update, True, real, real)


@njit(**COMPILED)
def _move_chunk(head: Any, index: Any, entry: Any, real: Any) -> None:
    """Step some rows (lines 10 to 14), and iterate on what they have become in the same pass."""
    chunk = chunk_at(head, index)
    weight = weight_at(head, chunk[t.OWNER])
    width, size, real_size = weight[t.WIDTH], head[t.SIZE], head[t.REAL_SIZE]
    if weight[t.GOES_AHEAD]:
        clear(at(sums_of(head, chunk, t.OF_WEIGHT), real), width)
    row = chunk[t.ROW]
    while row < chunk[t.END_ROW]:
        rows = _rows_from(chunk, weight, row)
        param = weight[t.PARAM] + row * width * size
        update = head[t.UPDATES] + (weight[t.UPDATE_AT] + row * width) * real_size
        _move_rows(head, chunk, rows[1] - row, param, update, entry, real)
        if weight[t.GOES_AHEAD]:
            _iterate_rows(head, chunk, t.OF_WEIGHT, rows, param, False, entry, real)
        row = rows[1]
    if weight[t.GOES_AHEAD]:
        norm_at(head, index)[t.OF_WEIGHT] = _look(head, chunk, entry, real)[0]


@njit(**COMPILED)
def _move_rows(
    head: Any, chunk: Any, rows: Any, param: Any, update: Any, entry: Any, real: Any
) -> None:
    """Step rows of a chunk from an address on, each piece by the rate of its part."""
    weight = weight_at(head, chunk[t.OWNER])
    decay, width = option_of(head, weight)[t.DECAY], weight[t.WIDTH]
    for index in range(chunk[t.PIECE], chunk[t.END_PIECE]):
        piece = piece_at(head, index)
        rate = value_at(head, piece[t.PART])[t.CLIPPED]
        keep, factor = cast(1 - rate * decay, real), cast(rate, real)
        count = piece[t.END_COLUMN] - piece[t.COLUMN]
        runs = rows
        if count == width:
            runs, count = 1, rows * width
        for run in range(runs):
            start = run * width + piece[t.COLUMN]
            entries = at(param + start * head[t.SIZE], entry)
            move_entries(entries, at(update + start * head[t.REAL_SIZE], real), count, keep, factor)


@njit(**COMPILED)
def _work(head: Any, first: Any, end: Any, entry: Any, real: Any) -> None:
    """Do the task that the head names for a range of chunks."""
    for index in range(first, end):
        if head[t.TASK] == t.UPDATE:
            _update_chunk(head, index, entry, real)
        elif head[t.TASK] == t.ITERATE:
            _iterate_chunk(head, index, entry, real)
        else:
            _move_chunk(head, index, entry, real)


def work_float32(address: Any, first: Any, end: Any) -> None:
    """Work on a range of chunks of float32 weights."""
    _work(integers(address), first, end, singles(0), singles(0))


def work_float64(address: Any, first: Any, end: Any) -> None:
    """Work on a range of chunks of float64 weights."""
    _work(integers(address), first, end, doubles(0), doubles(0))


def work_bfloat16(address: Any, first: Any, end: Any) -> None:
    """Work on a range of chunks of bfloat16 weights, whose vectors are float32."""
    _work(integers(address), first, end, halves(0), singles(0))

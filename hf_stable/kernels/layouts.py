"""Where the matrices of a weight lie in its memory, and how the work on many weights is cut up.

Arithmetic on shapes; what does not depend on the step is made once and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np

__all__ = ["Layout", "Plan", "lay_out", "make_plan"]

CHUNK_NUMEL = 1 << 16
"""Entries of a chunk, roughly. A chunk is what one thread takes at a time."""

FEWEST_ROWS = 32
"""Rows of a chunk at least, where the weight has so many: each chunk adds one row of sums."""

MOST_CHUNKS = 256
"""Chunks of a weight, roughly, whatever its size."""

BATCH_NUMEL = 1 << 18
"""Entries of weights that take each pass together. What a pass has read is still in the cache for
the next one; fewer batches would be fewer waits for the slowest thread."""

THREAD_NUMEL = 1 << 14
"""Entries of a batch for each thread that shares it: waking one up for less does not pay."""


class Piece(NamedTuple):
    """A range of columns that belongs to one part; its share of the part's vector starts at `at`."""

    part: int
    start: int
    stop: int
    at: int


class Band(NamedTuple):
    """A range of rows that hold the same pieces; the first is row `part_row` of their parts."""

    start: int
    stop: int
    part_row: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """A contiguous weight as rows in memory, and the matrices in them.

    Attributes:
        height: number of rows.
        width: entries of a row.
        bands: ranges of rows, which cover the weight.
        shapes: (rows, columns) of each part.
    """

    height: int
    width: int
    bands: tuple[Band, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def is_vector(self) -> bool:
        """Whether a row has one entry, so that sigma is the l2 norm."""
        return self.width == 1 and len(self.shapes) == 1

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return self.height * self.width


@lru_cache(maxsize=None)
def lay_out(
    shape: tuple[int, ...],
    shares: tuple[int, ...] = (1,),
    repeats: int = 1,
    dim: int = 0,
    stacked: bool = False,
) -> Layout | None:
    """Return the layout of a contiguous weight, or None for one that the passes cannot follow.

    Args:
        shape: of the weight. Dimensions after the first are one row each; a vector is a column.
        shares: relative lengths of its parts along a dimension of the matrix.
        repeats: how often the row of pieces is repeated there.
        dim: that dimension.
        stacked: whether the weight is a stack of such matrices.
    """
    if 0 in shape or (dim == 1 and repeats > 1):
        return None
    shape = shape or (1,)
    number, *matrix = shape if stacked else (1, *shape)
    height, width = matrix[0], prod(matrix[1:])
    length = height if dim == 0 else width
    unit = length // (repeats * sum(shares))
    sizes = [share * unit for share in shares]
    starts = [0, *accumulate(sizes * repeats)]
    pieces = tuple(
        (place % len(shares), start, stop)
        for place, (start, stop) in enumerate(zip(starts, starts[1:], strict=False))
    )
    bands: list[Band] = []
    for index in range(number):
        top, first = index * height, index * len(shares)
        if dim == 1:
            own = tuple(Piece(first + part, start, stop, 0) for part, start, stop in pieces)
            bands.append(Band(top, top + height, 0, own))
            continue
        for place, (part, start, stop) in enumerate(pieces):
            whole = (Piece(first + part, 0, width, 0),)
            row = place // len(shares) * sizes[part]
            bands.append(Band(top + start, top + stop, row, whole))
    shapes = [(size * repeats, width) if dim == 0 else (height, size) for size in sizes]
    return Layout(number * height, width, tuple(bands), tuple(shapes * number))


@dataclass(frozen=True, eq=False)
class Plan:
    """How the work on a list of weights is cut up: the tables of `loops` without addresses.

    Attributes:
        chunks: OWNER, ROW, END_ROW, PIECE, END_PIECE, SUM_AT, PRODUCT_AT, PART_ROW.
        pieces: PART, COLUMN, END_COLUMN, VECTOR_AT.
        parts: V_AT, LENGTH, U_AT.
        weights: WIDTH, UPDATE_AT, FIRST_PART, END_PART, FIRST_CHUNK, END_CHUNK.
        batches: FIRST_WEIGHT, END_WEIGHT, and the most threads that share them.
        vector_starts: where the vectors of each weight start among those of all; the last is their
            number of entries.
        area: entries of the largest batch, its sums and its products.
    """

    chunks: np.ndarray
    pieces: np.ndarray
    parts: np.ndarray
    weights: np.ndarray
    batches: np.ndarray
    vector_starts: np.ndarray
    area: tuple[int, int, int]


@lru_cache(maxsize=16)
def make_plan(layouts: tuple[Layout, ...]) -> Plan:
    """Cut up the work on weights of these layouts."""
    builder = _Builder()
    for layout in layouts:
        builder.add(layout)
    return builder.finish()


class _Builder:
    """Collects the rows of a plan, weight by weight."""

    def __init__(self) -> None:
        self.chunks: list[tuple[int, ...]] = []
        self.pieces: list[tuple[int, ...]] = []
        self.parts: list[tuple[int, ...]] = []
        self.weights: list[tuple[int, ...]] = []
        self.batches: list[tuple[int, ...]] = []
        self.vector_starts = [0]
        self.batch = [0, 0, 0, 0, 0]  # first weight and chunk; entries, sums and products so far
        self.areas = [(0, 0, 0)]

    def add(self, layout: Layout) -> None:
        """Add a weight, to the running batch where it fits."""
        if self.batch[2] and self.batch[2] + layout.numel > BATCH_NUMEL:
            self.end_batch()
        first_part, first_chunk = len(self.parts), len(self.chunks)
        v_at = u_at = 0
        for rows, columns in layout.shapes:
            self.parts.append((v_at, columns, u_at))
            v_at, u_at = v_at + columns, u_at + rows
        for band in layout.bands:
            self.add_band(layout, band, first_part)
        self.weights.append(
            (layout.width, self.batch[2], first_part, len(self.parts), first_chunk, len(self.chunks))
        )
        self.vector_starts.append(self.vector_starts[-1] + v_at)
        self.batch[2] += layout.numel

    def add_band(self, layout: Layout, band: Band, first_part: int) -> None:
        """Add the chunks and pieces of a range of rows."""
        piece = len(self.pieces)
        for part, start, stop, at in band.pieces:
            v_at = self.parts[first_part + part][0] + at
            self.pieces.append((first_part + part, start, stop, v_at))
        rows = band.stop - band.start
        fitting = max(FEWEST_ROWS, -(-CHUNK_NUMEL // layout.width), -(-layout.height // MOST_CHUNKS))
        number = max(1, round(rows / fitting))
        cuts = [rows * i // number // 4 * 4 for i in range(number)] + [rows]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            where = (band.start + start, band.start + stop, piece, len(self.pieces))
            self.chunks.append((len(self.weights), *where, *self.batch[3:], band.part_row + start))
            self.batch[3] += layout.width
            self.batch[4] += (stop - start) * len(band.pieces)

    def end_batch(self) -> None:
        """Close the running batch and begin the next one."""
        first_weight, first_chunk, *area = self.batch
        threads = max(1, min(area[0] // THREAD_NUMEL, len(self.chunks) - first_chunk))
        self.batches.append((first_weight, len(self.weights), threads))
        self.areas.append((area[0], area[1], area[2]))
        self.batch = [len(self.weights), len(self.chunks), 0, 0, 0]

    def finish(self) -> Plan:
        """Return the plan."""
        self.end_batch()
        tables = (self.chunks, self.pieces, self.parts, self.weights, self.batches)
        updates, sums, products = (max(sizes) for sizes in zip(*self.areas, strict=True))
        return Plan(
            *(np.array(table, dtype=np.int64) for table in tables),
            np.array(self.vector_starts, dtype=np.int64),
            (updates, sums, products),
        )

"""Where the matrices of a weight lie in its memory, and how the work on many weights is cut up.

Arithmetic on shapes; what does not depend on the step is made once and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from hf_stable.measures.parts import Parts

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
    """A range of columns that belongs to one part."""

    part: int
    start: int
    stop: int


class Band(NamedTuple):
    """A range of rows that hold the same pieces; the first of them is row `part_row` of a part."""

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

    @property
    def most_rows(self) -> int:
        """Rows of the tallest part: what each part has for its left vector."""
        return max(rows for rows, _ in self.shapes)

    @property
    def most_columns(self) -> int:
        """Columns of the widest part: what each part has for its right vector."""
        return max(columns for _, columns in self.shapes)


@cache
def lay_out(shape: torch.Size, parts: Parts) -> Layout | None:
    """Return the layout of a contiguous weight, or None for one that the passes cannot follow.

    That is one without entries, or with parts whose columns lie apart.

    Args:
        shape: of the weight. Dimensions of a kernel after the first are one row; a vector is a
            column.
        parts: where its matrices lie.

    Raises:
        ValueError: if it cannot be cut like this.
    """
    if 0 in shape or (parts.dim == 1 and parts.is_interleaved):
        return None
    number, height, *rest = shape if parts.stacked else (1, *(shape or (1,)))
    width, per_matrix = prod(rest), len(parts.shares)
    shapes = parts.shapes((number, height, width) if parts.stacked else (height, width))
    runs = parts.runs(height if parts.dim == 0 else width)
    bands: list[Band] = []
    for index in range(number):
        top, first = index * height, index * per_matrix
        if parts.dim == 1:
            pieces = tuple(Piece(first + part, start, stop) for start, stop, part in runs)
            bands.append(Band(top, top + height, 0, pieces))
            continue
        for place, (start, stop, part) in enumerate(runs):
            whole = (Piece(first + part, 0, width),)
            part_row = place // per_matrix * (stop - start)
            bands.append(Band(top + start, top + stop, part_row, whole))
    return Layout(number * height, width, tuple(bands), tuple(shapes))


@dataclass(frozen=True, eq=False)
class Plan:
    """How the work on a list of weights is cut up: the tables of `loops` without addresses.

    Attributes:
        chunks: OWNER, ROW, END_ROW, PIECE, END_PIECE, SUM_AT, PRODUCT_AT, PART_ROW.
        pieces: PART, COLUMN, END_COLUMN.
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
        for index, (_, columns) in enumerate(layout.shapes):
            starts = index * layout.most_columns, index * layout.most_rows
            self.parts.append((starts[0], columns, starts[1]))
        for band in layout.bands:
            self.add_band(layout, band, first_part)
        parts, chunks = (first_part, len(self.parts)), (first_chunk, len(self.chunks))
        self.weights.append((layout.width, self.batch[2], *parts, *chunks))
        vectors = len(layout.shapes) * layout.most_columns
        self.vector_starts.append(self.vector_starts[-1] + vectors)
        self.batch[2] += layout.numel

    def add_band(self, layout: Layout, band: Band, first_part: int) -> None:
        """Add the chunks and pieces of a range of rows."""
        piece = len(self.pieces)
        for part, start, stop in band.pieces:
            self.pieces.append((first_part + part, start, stop))
        pieces, rows = (piece, len(self.pieces)), band.stop - band.start
        by_numel, by_number = -(-CHUNK_NUMEL // layout.width), -(-layout.height // MOST_CHUNKS)
        number = max(1, round(rows / max(FEWEST_ROWS, by_numel, by_number)))
        cuts = [rows * i // number // 4 * 4 for i in range(number)] + [rows]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            own = (band.start + start, band.start + stop)
            areas = (self.batch[3], self.batch[4])
            self.chunks.append((len(self.weights), *own, *pieces, *areas, band.part_row + start))
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
        chunks, pieces, parts, weights, batches, starts = (
            np.array(table, dtype=np.int64) for table in (*tables, self.vector_starts)
        )
        return Plan(chunks, pieces, parts, weights, batches, starts, (updates, sums, products))

"""How the work on many weights is cut up for the threads of a CPU: arithmetic on layouts.

What does not depend on the step is made once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from hf_stable.kernels.layouts import Band, Layout

__all__ = ["Plan", "make_plan"]

CHUNK_NUMEL = 1 << 16
"""Entries of a chunk, roughly."""

FEWEST_ROWS = 32
"""Rows of a chunk at least, where the weight has so many: each chunk adds one row of sums."""

MOST_CHUNKS = 256
"""Chunks of a weight, roughly, whatever its size."""

BATCH_NUMEL = 1 << 18
"""Entries of weights that take each pass together. What a pass has read is still in the cache for
the next one; fewer batches would be fewer waits for the slowest thread."""

SHARE_NUMEL = 1 << 13
"""Entries that a thread takes at a time, at least: each time it waits for the others' caches."""

OF_A_SUM = 4
"""Entries of a pass that take as long as a number of the sums between the passes."""

THREAD_NUMEL = 1 << 14
"""Entries of a batch for each thread: waking one up for less does not pay."""


@dataclass(frozen=True, eq=False)
class Plan:
    """How the work on a list of weights is cut up: the tables of `loops` without addresses.

    Attributes:
        chunks: OWNER, ROW, END_ROW, PIECE, END_PIECE, SUM_AT, PRODUCT_AT, PART_ROW.
        pieces: PART, COLUMN, END_COLUMN.
        parts: V_AT, LENGTH, U_AT.
        weights: WIDTH, UPDATE_AT, FIRST_PART, END_PART, FIRST_CHUNK, END_CHUNK.
        batches: FIRST_WEIGHT, END_WEIGHT, and where their shares of chunks and of weights stand:
            FIRST_OF_CHUNKS, END_OF_CHUNKS, FIRST_OF_WEIGHTS, END_OF_WEIGHTS.
        shares: FIRST, END: ranges of chunks or of weights.
        most_threads: that have something to do in the largest batch.
        vector_starts: where the vectors of each weight start among those of all; the last is their
            number of entries.
        area: entries of the largest batch, its sums and its products.
    """

    chunks: np.ndarray
    pieces: np.ndarray
    parts: np.ndarray
    weights: np.ndarray
    batches: np.ndarray
    shares: np.ndarray
    most_threads: int
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
        self.shares: list[tuple[int, int]] = []
        self.most_threads = 1
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
        chunks, weights = self.chunks[first_chunk:], self.weights[first_weight:]
        of_chunks = self.share(first_chunk, [self.work_on(chunk) for chunk in chunks])
        of_weights = self.share(first_weight, [self.work_between(weight) for weight in weights])
        self.batches.append((first_weight, len(self.weights), *of_chunks, *of_weights))
        threads = min(area[0] // THREAD_NUMEL, of_chunks[1] - of_chunks[0])
        self.most_threads = max(self.most_threads, threads)
        self.areas.append((area[0], area[1], area[2]))
        self.batch = [len(self.weights), len(self.chunks), 0, 0, 0]

    def work_on(self, chunk: tuple[int, ...]) -> int:
        """Return the entries of a chunk."""
        owner, row, end_row, *_ = chunk
        return (end_row - row) * self.weights[owner][0]

    @staticmethod
    def work_between(weight: tuple[int, ...]) -> int:
        """Return what it takes to sum up a weight, in entries of a pass."""
        width, _, _, _, first_chunk, end_chunk = weight
        return OF_A_SUM * width * (end_chunk - first_chunk)

    def share(self, first: int, work: list[int]) -> tuple[int, int]:
        """Cut a range up by the work on each of it; return where its shares stand."""
        begin, load, end = len(self.shares), 0, first + len(work)
        for index, each in enumerate(work, first):
            load += each
            if load >= SHARE_NUMEL or index + 1 == end:
                self.shares.append((first, index + 1))
                first, load = index + 1, 0
        return begin, len(self.shares)

    def finish(self) -> Plan:
        """Return the plan."""
        self.end_batch()
        updates, sums, products = (max(sizes) for sizes in zip(*self.areas, strict=True))
        return Plan(
            chunks=_table(self.chunks),
            pieces=_table(self.pieces),
            parts=_table(self.parts),
            weights=_table(self.weights),
            batches=_table(self.batches),
            shares=_table(self.shares),
            most_threads=self.most_threads,
            vector_starts=_table(self.vector_starts),
            area=(updates, sums, products),
        )


def _table(rows: Sequence[Any]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)

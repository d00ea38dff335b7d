"""How the work on a GPU's weights is cut up, what lies there for it, and how it is launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_stable.kernels.layouts import Layout

__all__ = ["MOST_COLUMNS", "Bucket", "Plan", "Workspace", "fits", "make_plan"]

MOST_COLUMNS = 1 << 14
"""Columns of a part at most: a program holds a row of it."""

FEWEST_COLUMNS = 64
"""Columns of the smallest blocks: fewer would be more launches for no less work."""

MOST_CHUNKS = 128
"""Chunks of a part, roughly: programs that share it."""

FEWEST_ROWS = 16
"""Rows of a chunk at least: each adds one row of sums."""


def fits(layout: Layout) -> bool:
    """Say whether a program can hold a row of every part."""
    return layout.most_columns <= MOST_COLUMNS


class Bucket(NamedTuple):
    """Chunks and parts whose rows are of about one length, which are launched together."""

    block: int
    aligned: bool
    first_chunk: int
    num_chunks: int
    first_part: int
    num_parts: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The tables of `triton_loops` that do not depend on the step.

    Attributes:
        chunks: its table of chunks.
        parts: its table of parts.
        shapes: WIDTH and IS_VECTOR of each weight.
        buckets: what is launched together.
        areas: entries of the sums of one matrix, and of the products.
    """

    chunks: np.ndarray
    parts: np.ndarray
    shapes: np.ndarray
    buckets: tuple[Bucket, ...]
    areas: tuple[int, int]


@lru_cache(maxsize=16)
def make_plan(layouts: tuple[Layout, ...]) -> Plan:
    """Cut up the work on weights of these layouts."""
    own: dict[tuple[int, bool], list[tuple[tuple[int, ...], list[list[int]]]]] = {}
    for owner, layout in enumerate(layouts):
        for place, (columns, ranges) in enumerate(_ranges(layout)):
            block = max(FEWEST_COLUMNS, 1 << (min(columns, MOST_COLUMNS) - 1).bit_length())
            aligned = (layout.is_vector or layout.width % 8 == 0) and ranges[0][2] % 8 == 0
            length = 0 if layout.is_vector else columns
            part = (owner, place, place * layout.most_columns, place * layout.most_rows, length)
            own.setdefault((block, aligned), []).append((part, ranges))
    chunks: list[list[int]] = []
    parts: list[tuple[int, ...]] = []
    buckets = []
    sums = products = 0
    for (block, aligned), members in own.items():
        first_chunk, first_part = len(chunks), len(parts)
        for known, ranges in members:
            begin = len(chunks)
            for row, end_row, column, end_column, part_row in ranges:
                where = [row, end_row, column, end_column, sums, products, part_row]
                chunks.append([len(parts), *where])
                sums, products = sums + end_column - column, products + end_row - row
            parts.append((*known, begin, len(chunks)))
        counts = (first_chunk, len(chunks) - first_chunk, first_part, len(parts) - first_part)
        buckets.append(Bucket(block, aligned, *counts))
    shapes = [(each.height if each.is_vector else each.width, each.is_vector) for each in layouts]
    made = [np.array(table, dtype=np.int64) for table in (chunks, parts, shapes)]
    return Plan(made[0], made[1], made[2], tuple(buckets), (sums, products))


def _ranges(layout: Layout) -> list[tuple[int, list[list[int]]]]:
    """Return for each part its columns, and its chunks: rows, columns, row of the part."""
    if layout.is_vector:  # one row, cut along its length
        cuts = [*range(0, layout.height, MOST_COLUMNS), layout.height]
        ranges = [[0, 1, a, b, 0] for a, b in zip(cuts, cuts[1:], strict=False)]
        return [(min(layout.height, MOST_COLUMNS), ranges)]
    found: list[list[list[int]]] = [[] for _ in layout.shapes]
    for band in layout.bands:
        rows = band.stop - band.start
        number = max(1, rows // max(FEWEST_ROWS, -(-rows // MOST_CHUNKS)))
        cuts = [rows * i // number for i in range(number + 1)]
        for piece in band.pieces:
            found[piece.part] += [
                [band.start + a, band.start + b, piece.start, piece.stop, band.part_row + a]
                for a, b in zip(cuts, cuts[1:], strict=False)
            ]
    columns = [width for _, width in layout.shapes]
    return list(zip(columns, found, strict=True))


class Workspace:
    """What lies on the device from step to step of the same weights. It is no state."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Put a plan on a device and make room."""
        self.plan, self.device = plan, device
        self.chunks, self.parts = (self._put(table) for table in (plan.chunks, plan.parts))
        sums, products = plan.areas
        self.sums = torch.empty(2 * sums, device=device)
        self.products = torch.empty(products, device=device)
        self.squares = torch.empty(2 * len(plan.chunks), device=device)
        self.values = torch.zeros(7 * len(plan.parts), device=device)
        self.never = torch.zeros(1, device=device)
        self._tables: dict[str, tuple[Any, Tensor]] = {}

    def table(self, name: str, content: np.ndarray) -> Tensor:
        """Return a table on the device, which is copied there only when it has changed."""
        key = content.tobytes()
        if name not in self._tables or self._tables[name][0] != key:
            self._tables[name] = key, self._put(content)
        return self._tables[name][1]

    def _put(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(array)
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def launch(self, kernel: Any, grid: str, arguments: Callable[[Bucket], dict[str, Any]]) -> None:
        """Launch a kernel on every bucket, a program for each of its chunks or parts."""
        for bucket in self.plan.buckets:
            kernel[(getattr(bucket, f"num_{grid}"),)](
                begin=getattr(bucket, f"first_{grid[:-1]}"),
                num_warps=max(4, min(16, bucket.block // 1024)),
                BLOCK=bucket.block,
                **arguments(bucket),
            )

"""Where the matrices of a weight lie in its memory: arithmetic on shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch

from hf_stable.measures.parts import Parts

__all__ = ["Band", "Layout", "lay_out"]


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

"""Which block of a matrix is here, where processes share a weight by ranges of its flat entries.

DeepSpeed ZeRO lays weights one behind the other and cuts the whole at equal distances, in the
middle of a row as well. A range of entries is some whole rows and, at either end, a part of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from hf_stable.measures.matrix_shards import Held, MatrixShard
from hf_stable.measures.parts import WHOLE, Parts

__all__ = ["FlatRange"]


@dataclass(frozen=True)
class FlatRange:
    """The entries `start : start + len(local)` of a flattened weight; others hold the rest.

    Attributes:
        local: (entries here,); it may be empty.
        start: number of the first of them in the weight.
        cuts: where the ranges of processes begin within the weight, the same on all of them: empty
            where one process holds all of it.
        shape: of the weight: a matrix, a kernel, a vector, or a stack.
        group: the process group over whose ranks it is spread.
    """

    local: Tensor
    start: int
    cuts: tuple[int, ...]
    shape: torch.Size
    group: Any

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.local.device

    @property
    def dtype(self) -> torch.dtype:
        """What the entries are."""
        return self.local.dtype

    @property
    def is_shared(self) -> bool:
        """Whether more than one process holds entries."""
        return bool(self.cuts)

    def whole(self) -> Tensor:
        """View the weight, of which all is here."""
        return self.local.view(self.shape)

    def shards(self, parts: Parts = WHOLE) -> list[MatrixShard]:
        """Return what is here of each matrix of the weight.

        Where a cut lies within a row, the rest of that row is zeros here, in a copy; otherwise the
        shards are views, but copies where the rows or columns of a part lie apart.

        Args:
            parts: where its matrices lie.

        Raises:
            ValueError: if the weight cannot be cut like this.
        """
        width = prod(self.shape[2:] if parts.stacked else self.shape[1:])
        height = self.shape[1] if parts.stacked else self.shape[0]
        parts.check((*self.shape[: 1 + parts.stacked], width))
        first, rows = self._rows(width)
        splits = any(cut % width for cut in self.cuts)
        return [
            self._shard(rows, first - member * height, (height, width), own, parts, splits)
            for member in range(self.shape[0] if parts.stacked else 1)
            for own in _runs_by_part(parts, (height, width))
        ]

    def take(self, values: Tensor) -> Tensor:
        """Return those values that belong to the entries here.

        Args:
            values: a tensor that broadcasts with the whole weight.
        """
        width = prod(self.shape[1:])
        first, stop = self.start // width, -(-(self.start + len(self.local)) // width)
        at = self.start - first * width
        return values.expand(self.shape)[first:stop].reshape(-1)[at : at + len(self.local)]

    def _rows(self, width: int) -> tuple[int, Tensor]:
        """Return the rows of which anything is here, and the number of the first."""
        end = self.start + len(self.local)
        first, stop = self.start // width, -(-end // width)
        if self.start % width == 0 and end % width == 0:
            return first, self.local.view(stop - first, width)
        rows = self.local.new_zeros(stop - first, width)
        at = self.start - first * width
        rows.view(-1)[at : at + len(self.local)] = self.local
        return first, rows

    def _shard(
        self,
        rows: Tensor,
        first: int,
        size: tuple[int, int],
        runs: Sequence[slice],
        parts: Parts,
        splits: bool,
    ) -> MatrixShard:
        """Return the shard of one part of a matrix of which row `first` is the first one here."""
        height, width = size
        length = sum(run.stop - run.start for run in runs)
        if parts.dim == 1:
            own = rows[max(0, -first) : max(0, height - first)]
            columns = [own[:, run] for run in runs]
            local = columns[0] if len(runs) == 1 else torch.cat(columns, 1)
            held = slice(max(0, first), max(0, first) + len(own))
            return MatrixShard(
                local, (height, length), held, slice(0, length), splits, (self.group,)
            )
        pieces, places, before = [], [], 0
        for run in runs:
            start, stop = max(run.start, first), min(run.stop, first + len(rows))
            if start < stop:
                pieces.append(rows[start - first : stop - first])
                places.append((before + start - run.start, before + stop - run.start))
            before += run.stop - run.start
        return MatrixShard(
            torch.cat(pieces) if len(pieces) > 1 else (pieces or [rows[:0]])[0],
            (length, width), _held(places, rows.device), slice(0, width), splits, (self.group,),
        )  # fmt: skip


def _runs_by_part(parts: Parts, size: tuple[int, int]) -> list[list[slice]]:
    """Return for each part of a matrix where its pieces lie along `parts.dim`."""
    runs: list[list[slice]] = [[] for _ in parts.shares]
    for start, stop, part in parts.runs(size[parts.dim]):
        runs[part].append(slice(start, stop))
    return runs


def _held(places: Sequence[tuple[int, int]], device: torch.device) -> Held:
    if len(places) < 2:
        return slice(*places[0]) if places else slice(0, 0)
    return torch.cat([torch.arange(*place, device=device) for place in places])

"""Where the matrices lie that one weight holds: a fused projection, a stack of experts.

Arithmetic on shapes and views of tensors; nothing here knows a model or an optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import gcd
from typing import Any

import torch
from torch import Tensor

__all__ = ["WHOLE", "Parts"]


@dataclass(frozen=True)
class Parts:
    """How one weight is made of several matrices, each with a spectrum of its own.

    Dimension `dim` of the weight's matrix is cut into `repeats` equal runs, and each run into
    pieces whose lengths are as the shares. Part i is made of the i-th piece of every run, in their
    order. Sizes come from the weight, so one value serves weights of any width:

        Parts()                             one matrix
        Parts((1, 1, 1), dim=1)             [Wq | Wk | Wv] in (in, out): GPT-2
        Parts((8, 2, 2))                    8 query heads, 2 key and 2 value heads: Phi-3
        Parts((1, 1, 1), repeats=12)        q, k, v of head 0, then of head 1, ...: GPT-NeoX, BLOOM
        Parts((1, 1), stacked=True)         (experts, gate and up, in): 2 parts of every expert

    Attributes:
        shares: relative lengths of the parts along `dim`. Only their ratios count.
        repeats: how often the row of pieces is repeated.
        dim: the dimension of the matrix along which parts lie, that of the outputs: 0 for (out,
            in), 1 for (in, out).
        stacked: whether the weight is a stack (n, ...) of such matrices. Its parts are those of
            matrix 0, then those of matrix 1, and so on.

    Raises:
        ValueError: for shares or repeats that are no positive integers, or another dimension.
    """

    shares: tuple[int, ...] = (1,)
    repeats: int = 1
    dim: int = 0
    stacked: bool = False

    def __post_init__(self) -> None:
        """Check the numbers, and give equal layouts equal values."""
        shares = tuple(self.shares)
        numbers = (*shares, self.repeats)
        if (
            not shares
            or any(type(n) is not int or n < 1 for n in numbers)
            or self.dim not in (0, 1)
        ):
            raise ValueError(
                f"shares={self.shares!r}, repeats={self.repeats!r}, dim={self.dim!r} say no "
                "layout: give positive integers, and dimension 0 or 1 of the matrix"
            )
        if len(shares) == 1:
            object.__setattr__(self, "repeats", 1)
        divisor = gcd(*shares)
        object.__setattr__(self, "shares", tuple(share // divisor for share in shares))

    @classmethod
    def of(cls, plain: Any) -> Parts:
        """Return the layout that `to_plain` made plain data of; one that is none already as it is.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(plain, cls):
            return plain
        try:
            shares, repeats, dim, stacked = plain
            return _from_plain(tuple(shares), repeats, dim, bool(stacked))
        except TypeError as error:
            raise ValueError(f"{plain!r} says no layout of parts; give a Parts") from error

    def to_plain(self) -> tuple[tuple[int, ...], int, int, bool]:
        """Return tuples and numbers, for files that are read without this class."""
        return self.shares, self.repeats, self.dim, self.stacked

    @property
    def is_whole(self) -> bool:
        """Whether the weight is one matrix."""
        return len(self.shares) == 1 and not self.stacked

    @property
    def is_interleaved(self) -> bool:
        """Whether the rows or columns of a part lie apart."""
        return self.repeats > 1

    def count(self, shape: Sequence[int]) -> int:
        """Return the number of matrices in a weight of a shape: (m, n), stacked (e, m, n)."""
        return len(self.shares) * (shape[0] if self.stacked else 1)

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless a weight of this shape can be cut like this."""
        if len(shape) != 2 + self.stacked or self._length(shape) % self._unit:
            what = "a stack of matrices" if self.stacked else "a matrix"
            raise ValueError(
                f"cannot split dimension {self.dim} of a weight of shape {tuple(shape)} into "
                f"{self.repeats} x {self.shares}: give {what} with a multiple of {self._unit} there"
            )

    def lengths(self, length: int) -> list[int]:
        """Return how long each part of one matrix is along `dim`, which is `length` long."""
        return [share * (length // sum(self.shares)) for share in self.shares]

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Return the shape of every matrix in a weight of a shape.

        Raises:
            ValueError: if it cannot be cut like this.
        """
        self.check(shape)
        height, width = shape[-2:]
        own = [
            (each, width) if self.dim == 0 else (height, each)
            for each in self.lengths(self._length(shape))
        ]
        return own * (shape[0] if self.stacked else 1)

    def runs(self, length: int) -> list[tuple[int, int, int]]:
        """Return (start, stop, part) of every piece along `dim`, in order, for one matrix.

        Args:
            length: of that dimension; the pieces cover it.
        """
        unit = length // self._unit
        ends = list(accumulate(share * unit for share in self.shares))
        starts = [0, *ends[:-1]]
        return [
            (run * ends[-1] + start, run * ends[-1] + stop, part)
            for run in range(self.repeats)
            for part, (start, stop) in enumerate(zip(starts, ends, strict=True))
        ]

    def views(self, weight: Tensor) -> list[Tensor]:
        """Return a view of every part, for reading and writing.

        Args:
            weight: (m, n), stacked (e, m, n), of any strides.

        Returns:
            2-D views, but where parts are interleaved 3-D ones: `dim` has become two, (repeats,
            piece).

        Raises:
            ValueError: if the weight cannot be cut like this.
        """
        self.check(weight.shape)
        if self.stacked:
            return [view for one in weight.unbind() for view in self._views(one)]
        return self._views(weight)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """Return every part as a 2-D matrix: a view, or a copy where parts are interleaved.

        Args:
            weight: as for `views`.

        Raises:
            ValueError: if the weight cannot be cut like this.
        """
        views = self.views(weight)
        return (
            [view.flatten(self.dim, self.dim + 1) for view in views] if self.repeats > 1 else views
        )

    def vectors(self, outputs: Tensor) -> list[Tensor]:
        """Return the share of each part in a vector (length of `dim`,): of a bias, for example."""
        flat = Parts(self.shares, self.repeats)
        return [matrix[:, 0] for matrix in flat.matrices(outputs.unsqueeze(1))]

    def spread(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """Spread one value for each part over the weight.

        Args:
            values: (count,).
            shape: of the weight: (m, n) or a kernel (m, ...), whose parts lie along dimension 0;
                stacked (e, m, n).

        Returns:
            0-d for one matrix, else a tensor that broadcasts with the weight.
        """
        if self.is_whole:
            return values[0]
        by_stack = values.view(-1, len(self.shares))
        unit = self._length(shape) // self._unit
        columns = zip(by_stack.split(1, 1), self.shares, strict=True)
        pieces = [column.expand(-1, share * unit) for column, share in columns]
        row = torch.cat(pieces, 1).repeat(1, self.repeats)
        if self.stacked:
            return row.unsqueeze(2 if self.dim == 0 else 1)
        return row.view([-1 if axis == self.dim else 1 for axis in range(len(shape))])

    @property
    def _unit(self) -> int:
        return self.repeats * sum(self.shares)

    def _length(self, shape: Sequence[int]) -> int:
        return shape[self.dim + self.stacked]

    def _views(self, matrix: Tensor) -> list[Tensor]:
        lengths = self.lengths(matrix.shape[self.dim])
        if self.repeats == 1:
            return list(matrix.split(lengths, self.dim))
        pieces = [length // self.repeats for length in lengths]
        return list(matrix.unflatten(self.dim, (self.repeats, -1)).split(pieces, self.dim + 1))


WHOLE = Parts()
"""One weight, one matrix."""


@lru_cache(maxsize=256)
def _from_plain(shares: tuple[int, ...], repeats: int, dim: int, stacked: bool) -> Parts:
    """Return the same object for the same layout: the optimizer asks at every step."""
    return Parts(shares, repeats, dim, stacked)

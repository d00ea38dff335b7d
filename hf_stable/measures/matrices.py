"""What matrices a weight stands for, wherever its rows are kept.

Pure torch, no modules and no optimizers. `as_matrix` says how a convolution kernel or a vector
becomes a matrix, `Parts` how a fused weight becomes several, `matrices_of` the same of a weight
that may be sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_stable.measures.parts import WHOLE, Parts

__all__ = [
    "RowShard",
    "as_matrix",
    "local_matrices",
    "matrices_of",
    "shapes_of",
    "spectral_dtype",
    "spread_values",
]


def spectral_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which spectra of a weight of `dtype` are computed.

    float64 stays float64. Everything else becomes float32: a bfloat16 sigma is off by up to 0.4 %
    and a warm-started vector gets stuck in it.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_matrix(weight: Tensor) -> Tensor:
    """View a weight as the 2-D matrix whose spectral norm is meant.

    Args:
        weight: (out, in) is returned as it is; a convolution kernel (out, in, *kernel) becomes
            (out, in * prod(kernel)); a vector (d,) becomes (d, 1), so that its largest singular
            value is its l2 norm.

    Returns:
        A view of `weight`, never a copy of contiguous input.

    Raises:
        ValueError: for a scalar, which has no spectrum.
    """
    if weight.ndim == 0:
        raise ValueError("a scalar has no singular values; give it the shape (1,)")
    if weight.ndim == 1:
        return weight.unsqueeze(1)
    return weight if weight.ndim == 2 else weight.reshape(len(weight), prod(weight.shape[1:]))


def local_matrices(weight: Tensor, parts: Parts = WHOLE) -> list[Tensor]:
    """Return the matrices that a weight of this process stands for.

    Args:
        weight: any that `as_matrix` accepts, or (e, m, n) where the parts are stacked.
        parts: where its matrices lie.

    Returns:
        2-D views, but copies where parts are interleaved.

    Raises:
        ValueError: if the weight cannot be cut like this.
    """
    return parts.matrices(weight if parts.stacked else as_matrix(weight))


@dataclass(frozen=True)
class RowShard:
    """The rows `offset : offset + len(local)` of a (num_rows, n) matrix that ranks share.

    A rank may hold no row at all; it takes part in every collective all the same.
    """

    local: Tensor
    offset: int
    num_rows: int
    group: Any
    """The process group over whose ranks the rows are spread."""


def matrices_of(weight: Tensor, parts: Parts = WHOLE) -> list[Tensor | RowShard]:
    """Return the matrices that a weight stands for, wherever its rows are kept.

    Args:
        weight: a plain tensor as for `local_matrices`, or a DTensor that is replicated or sharded
            on dimension 0 (what FSDP2 makes).
        parts: where its matrices lie.

    Returns:
        Plain 2-D tensors, or `RowShard`s for a sharded weight; views, but copies where parts are
        interleaved.

    Raises:
        ValueError: for a DTensor that is sharded in any other way, or a weight that cannot be cut
            like this.
    """
    if not isinstance(weight, DTensor):
        return list(local_matrices(weight.detach(), parts))
    offset, group = _placed(weight)
    local = weight.to_local().detach()
    if group is None:
        return list(local_matrices(local, parts))
    if parts.stacked:
        return _shards_of_stack(local, offset, weight.shape, parts, group)
    local = as_matrix(local)
    parts.check((weight.shape[0], local.shape[1]))
    if parts.dim == 1 or len(parts.shares) == 1:
        found = parts.matrices(local) if parts.dim == 1 else [local]
        return [RowShard(matrix, offset, weight.shape[0], group) for matrix in found]
    return [_rows_of_part(local, offset, weight.shape[0], parts, i, group)
            for i in range(len(parts.shares))]  # fmt: skip


def shapes_of(shape: Sequence[int], parts: Parts = WHOLE) -> list[tuple[int, int]]:
    """Return the (m, n) of every matrix that a weight stands for.

    Args:
        shape: of the whole weight: a matrix, a convolution kernel, a vector or a scalar.
        parts: where its matrices lie.

    Raises:
        ValueError: if it cannot be cut like this.
    """
    shape = tuple(shape) or (1,)
    return parts.shapes(shape if parts.stacked else (shape[0], prod(shape[1:])))


def spread_values(values: Tensor, weight: Tensor, parts: Parts) -> Tensor:
    """Spread one value for each matrix over what this process holds of a weight.

    Args:
        values: (k,).
        weight: as for `matrices_of`.
        parts: where its k matrices lie.

    Returns:
        0-d for one matrix, else a tensor that broadcasts with the local part of the weight.
    """
    spread = parts.spread(values, weight.shape)
    if isinstance(weight, DTensor) and spread.ndim and spread.shape[0] > 1:
        offset, group = _placed(weight)
        if group is not None:
            return spread[offset : offset + len(weight.to_local())]
    return spread


def _placed(weight: DTensor) -> tuple[int, Any]:
    """Return where the local rows of a DTensor begin and who shares it; None where nobody does."""
    mesh, placements = weight.device_mesh, weight.placements
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not sharded:
        return 0, None
    if len(sharded) > 1 or not placements[sharded[0]].is_shard(0):
        raise ValueError(
            f"cannot take the spectrum of a DTensor placed as {placements}: allowed are "
            "replicated and sharded once, on dimension 0 (FSDP2's own layout)"
        )
    length = weight.shape[0]
    per_rank = -(-length // mesh.size(sharded[0]))
    offset = min(per_rank * mesh.get_local_rank(sharded[0]), length)
    return offset, mesh.get_group(sharded[0])


def _rows_of_part(
    local: Tensor, offset: int, num_rows: int, parts: Parts, part: int, group: Any
) -> RowShard:
    """Return what the local rows of a weight hold of one of its parts, in the part's own order."""
    end = offset + len(local)
    runs = [(start, stop) for start, stop, owner in parts.runs(num_rows) if owner == part]
    before = sum(min(max(offset - start, 0), stop - start) for start, stop in runs)
    pieces = [
        local[max(start, offset) - offset : min(stop, end) - offset]
        for start, stop in runs
        if start < end and stop > offset
    ]
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces or [local[:0]])
    return RowShard(rows, before, parts.lengths(num_rows)[part], group)


def _shards_of_stack(
    local: Tensor, offset: int, shape: Sequence[int], parts: Parts, group: Any
) -> list[Tensor | RowShard]:
    """Return the matrices of a stack whose first dimension ranks share: each is whole on one."""
    parts.check(shape)
    mine = parts.matrices(local) if len(local) else []
    per_one = len(parts.shares)
    shards: list[Tensor | RowShard] = []
    for index, (height, width) in enumerate(parts.shapes(shape)):
        own = index - offset * per_one
        matrix = mine[own] if 0 <= own < len(mine) else local.new_empty(0, width)
        shards.append(RowShard(matrix, 0, height, group))
    return shards

"""What matrices a weight stands for, wherever its rows are kept.

Pure torch, no modules and no optimizers. `as_matrix` says how a convolution kernel or a vector
becomes a matrix, `split_blocks` how a fused weight becomes several, `matrix_blocks` the same of a
sharded weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["RowShard", "as_matrix", "matrix_blocks", "spectral_dtype", "split_blocks"]


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


def split_blocks(weight: Tensor, num_blocks: int, dim: int) -> tuple[Tensor, ...]:
    """Split a fused matrix into equal blocks, as views.

    GPT-2's `c_attn` keeps `[Wq | Wk | Wv]` in one (in, 3 * out) matrix: three blocks along dim 1.

    Args:
        weight: 2-D matrix.
        num_blocks: number of blocks; must divide the length of `dim`.
        dim: the dimension along which the blocks lie, 0 or 1.

    Raises:
        ValueError: if the length is not a multiple of `num_blocks`.
    """
    if num_blocks < 1 or weight.shape[dim] % num_blocks:
        raise ValueError(
            f"cannot split dimension {dim} of a {tuple(weight.shape)} weight into {num_blocks} "
            "equal blocks"
        )
    return tuple(weight.chunk(num_blocks, dim=dim)) if num_blocks > 1 else (weight,)


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


def matrix_blocks(weight: Tensor, num_blocks: int = 1, dim: int = 0) -> list[Tensor | RowShard]:
    """Return the matrices that a weight stands for, wherever its rows are kept.

    Args:
        weight: a plain tensor of any shape that `as_matrix` accepts, or a DTensor that is
            replicated or sharded on dimension 0 (what FSDP2 makes).
        num_blocks: number of equal blocks of a fused weight.
        dim: dimension of the matrix along which the blocks lie.

    Returns:
        Views: plain 2-D tensors, or `RowShard`s for a sharded weight.

    Raises:
        ValueError: for a DTensor that is sharded in any other way.
    """
    if not isinstance(weight, DTensor):
        return list(split_blocks(as_matrix(weight.detach()), num_blocks, dim))
    mesh, placements = weight.device_mesh, weight.placements
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    local = as_matrix(weight.to_local().detach())
    if not sharded:
        return list(split_blocks(local, num_blocks, dim))
    if len(sharded) > 1 or not placements[sharded[0]].is_shard(0):
        raise ValueError(
            f"cannot take the spectrum of a DTensor placed as {placements}: allowed are "
            "replicated and sharded once, on dimension 0 (FSDP2's own layout)"
        )
    num_rows = weight.shape[0]
    rows_per_rank = -(-num_rows // mesh.size(sharded[0]))
    offset = min(rows_per_rank * mesh.get_local_rank(sharded[0]), num_rows)
    group = mesh.get_group(sharded[0])
    if dim == 1 or num_blocks == 1:
        blocks = split_blocks(local, num_blocks, 1)
        return [RowShard(block, offset, num_rows, group) for block in blocks]
    # Blocks of rows: a rank holds the part of each block that falls into its own rows.
    if num_rows % num_blocks:
        raise ValueError(f"cannot split {num_rows} rows into {num_blocks} equal blocks")
    height = num_rows // num_blocks
    shards: list[Tensor | RowShard] = []
    for start in range(0, num_rows, height):
        first = min(max(start, offset), start + height)
        last = min(max(start, offset + len(local)), start + height)
        rows = local[first - offset : last - offset] if last > first else local[:0]
        shards.append(RowShard(rows, first - start, height, group))
    return shards

"""What matrices a weight stands for, wherever its rows and columns are kept.

Pure torch, no modules and no optimizers. `as_matrix` says how a convolution kernel or a vector
becomes a matrix, `Parts` how a fused weight becomes several, `matrices_of` the same of a weight
that may be sharded, of which `matrix_shards` says what is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_stable._ranks import local_tensor
from hf_stable.measures.flat_ranges import FlatRange
from hf_stable.measures.matrix_shards import MatrixShard, is_shared, shards_of, take_held
from hf_stable.measures.parts import WHOLE, Parts

__all__ = [
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


def matrices_of(weight: Tensor | FlatRange, parts: Parts = WHOLE) -> list[Tensor | MatrixShard]:
    """Return the matrices that a weight stands for, wherever its rows and columns are kept.

    Args:
        weight: a plain tensor as for `local_matrices`, or a DTensor that is replicated or sharded
            along any of its dimensions, over a mesh of any number of dimensions (FSDP2, HSDP,
            tensor parallelism, expert parallelism, and two of them together); or a range of its
            flat entries (DeepSpeed ZeRO).
        parts: where its matrices lie.

    Returns:
        Plain 2-D tensors, or `MatrixShard`s for a sharded weight; views, but copies where parts are
        interleaved.

    Raises:
        ValueError: for a DTensor whose values are still to be summed over processes, or a weight
            that cannot be cut like this.
    """
    if isinstance(weight, FlatRange):
        return (
            list(weight.shards(parts))
            if weight.is_shared
            else list(local_matrices(weight.whole().detach(), parts))
        )
    if isinstance(weight, DTensor) and is_shared(weight):
        return list(shards_of(weight, parts))
    return list(local_matrices(local_tensor(weight).detach(), parts))


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


def spread_values(values: Tensor, weight: Tensor | FlatRange, parts: Parts) -> Tensor:
    """Spread one value for each matrix over what this process holds of a weight.

    Args:
        values: (k,).
        weight: as for `matrices_of`.
        parts: where its k matrices lie.

    Returns:
        0-d for one matrix, else a tensor that broadcasts with the local part of the weight.
    """
    spread = parts.spread(values, weight.shape)
    if spread.ndim and isinstance(weight, FlatRange):
        return weight.take(spread)
    if spread.ndim and isinstance(weight, DTensor) and is_shared(weight):
        return take_held(spread, weight)
    return spread

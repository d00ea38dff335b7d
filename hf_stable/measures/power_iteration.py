"""Power iteration, one step at a time: how the largest singular value of a weight is tracked.

Pure torch, no modules and no optimizers. Every result is float32, or float64 for float64 input,
whatever autocast or the weight says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from math import gcd, inf
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_stable.measures.matrices import RowShard

__all__ = ["SingularTriple", "generic_vector", "power_step", "step_batch"]

STACK_MAX_NUMEL = 1 << 15
"""On a CPU, matrices of up to so many entries are copied into one batch: cheaper than a call for
each. On a GPU, where a kernel's launch costs more than the copy, all are."""

MAX_BANDS = 16
"""Parts of a matrix whose products with a vector the threads of a CPU share."""


class SingularTriple(NamedTuple):
    """A singular value with its unit vectors: `W @ v == sigma * u` and `W.T @ u == sigma * v`.

    For a matrix (m, n): sigma has shape (), u (m,), v (n,). A leading batch dimension of the
    matrix leads all three. Units: sigma is in the units of the matrix.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor


@torch.no_grad()
def power_step(
    matrices: Sequence[Tensor | RowShard], u: Sequence[Tensor] | None, v: Sequence[Tensor]
) -> list[SingularTriple]:
    """Move each pair of vectors by one power iteration and read sigma off it.

    `u <- normalize(W v)`, `v <- normalize(W.T u)`, `sigma = u.T W v = |W.T u|`
    (Zhai et al. 2023, section 3.3; Qi et al. 2025, section 2). Warm-started from the vectors of
    the step before, one iteration tracks a weight that moves slowly. The estimate never exceeds
    the true sigma_1. Two passes over each matrix; equal shapes share their vector arithmetic; all
    sharded matrices of a process group share one all-reduce. No host synchronisation. In float32
    sigma is right from about 1e-18 to 1e18, where its square has a place.

    Args:
        matrices: (m, n) tensors of any floating dtype and strides, or `RowShard`s of such.
        u: left vectors (m,), kept where a matrix is zero or has non-finite entries; or None, for
            a caller that keeps v alone.
        v: right vectors (n,), from which the step starts; kept in the same cases.

    Returns:
        New tensors, in the order of `matrices`; sigma is 0 for a zero matrix and NaN for a
        non-finite one, whose old vectors come back unchanged, so that one bad step does not
        poison the next.
    """
    results: list[SingularTriple | None] = [None] * len(matrices)
    shapes: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    groups: defaultdict[Any, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        if isinstance(matrix, RowShard):
            groups[matrix.group].append(index)
        else:
            shapes[(matrix.shape, v[index].dtype, matrix.device)].append(index)
    for indices in shapes.values():
        _step_whole(matrices, u, v, indices, results)
    for group, indices in groups.items():
        _step_sharded(matrices, u, v, indices, results, group)
    return [triple for triple in results if triple is not None]


def step_batch(
    times: Callable[[Tensor], Tensor],
    times_transposed: Callable[[Tensor], Tensor],
    u: Tensor | None,
    v: Tensor,
) -> SingularTriple:
    """Move the vectors of b matrices, known by their products, by one power iteration.

    Everything that iterates on whole matrices comes here; see `power_step`.

    Args:
        times: maps rows (b, n) to the products `W v`, (b, m), as new memory.
        times_transposed: maps rows (b, m) to `W.T u`, (b, n), as new memory.
        u: left vectors (b, m), or None for a caller that keeps v alone.
        v: right vectors (b, n).

    Returns:
        sigma (b,), u (b, m), v (b, n).
    """
    new_u = times(v)
    new_u /= _norm(new_u)
    new_v = times_transposed(new_u)
    sigma = torch.linalg.vector_norm(new_v, dim=1, keepdim=True)
    new_v /= _norm(new_v)
    new_u, new_v = _mend(sigma, (new_u, u), (new_v, v))
    return SingularTriple(sigma[:, 0], new_u, new_v)


def _step_whole(
    matrices: Sequence[Any],
    u: Sequence[Tensor] | None,
    v: Sequence[Tensor],
    indices: list[int],
    results: list[SingularTriple | None],
) -> None:
    """Step the matrices at `indices`, all of one shape, as one batch where that is cheaper."""
    old_u = None if u is None else torch.stack([u[i] for i in indices])
    old_v = torch.stack([v[i] for i in indices])
    own = [matrices[i] for i in indices]
    together: list[Tensor] | Tensor
    transposed: list[Tensor] | Tensor
    if _is_batched(own[0]):
        together = torch.stack(own).to(old_v.dtype)
        transposed = together.mT
    else:
        together = [matrix.to(old_v.dtype) for matrix in own]
        transposed = [matrix.T for matrix in together]
    with torch.autocast(old_v.device.type, enabled=False):
        moved = step_batch(partial(_times, together), partial(_times, transposed), old_u, old_v)
    rows = zip(*(part.unbind() for part in moved), strict=True)
    for index, row in zip(indices, rows, strict=True):
        results[index] = SingularTriple(*row)


def _is_batched(matrix: Tensor) -> bool:
    """Say whether matrices of this shape go into one batch."""
    return not matrix.is_cpu or matrix.numel() <= STACK_MAX_NUMEL


def _times(matrices: list[Tensor] | Tensor, rows: Tensor) -> Tensor:
    """Return the products of matrices (b, m, n), or b of (m, n), with the rows (b, n): (b, m)."""
    if isinstance(matrices, Tensor):
        # The vector on the left: several times faster on a CPU than a one-column right side.
        return torch.bmm(rows.unsqueeze(1), matrices.mT).squeeze(1)
    products = rows.new_empty(len(matrices), matrices[0].shape[0])
    for product, matrix, row in zip(products, matrices, rows, strict=True):
        _write_product(matrix, row, product)
    return products


def _write_product(matrix: Tensor, row: Tensor, product: Tensor) -> None:
    """Write `W v` to `product`; on a CPU with all threads, of which BLAS takes one for a vector."""
    by_rows = matrix.stride(1) == 1
    bands = 1
    if matrix.is_cpu and torch.get_num_threads() > 1 and 1 in matrix.stride():
        bands = gcd(matrix.shape[0 if by_rows else 1], MAX_BANDS)
    if bands == 1:
        torch.mv(matrix, row, out=product)
    elif by_rows:
        parts = matrix.unflatten(0, (bands, -1)).mT
        torch.bmm(row.expand(bands, 1, -1), parts, out=product.view(bands, 1, -1))
    else:
        parts = matrix.T.unflatten(0, (bands, -1))
        torch.sum(torch.bmm(row.view(bands, 1, -1), parts)[:, 0], 0, out=product)


def _step_sharded(
    matrices: Sequence[Any],
    u: Sequence[Tensor] | None,
    v: Sequence[Tensor],
    indices: list[int],
    results: list[SingularTriple | None],
    group: Any,
) -> None:
    """Step row-sharded matrices with one all-reduce for all of them.

    Each rank adds its rows of `y = W v` and its share of `z = W.T y`; then `u = y / |y|`,
    `v = z / |z|` and `sigma = |z| / |y|` follow on every rank from the same sums, bit for bit.
    """
    sizes = [size for i in indices for size in (matrices[i].num_rows, len(v[i]))]
    sums = torch.zeros(sum(sizes), dtype=v[indices[0]].dtype, device=v[indices[0]].device)
    parts = sums.split(sizes)
    with torch.autocast(sums.device.type, enabled=False):
        for index, y, z in zip(indices, parts[::2], parts[1::2], strict=True):
            shard = matrices[index]
            rows = shard.local.to(device=sums.device, dtype=sums.dtype)
            mine = y[shard.offset : shard.offset + len(rows)]
            torch.mv(rows, v[index].to(sums.dtype), out=mine)
            torch.mv(rows.T, mine, out=z)
    dist.all_reduce(sums, group=group)

    # From here on all vectors are one: a kernel's launch costs more than the work on any of them.
    def spread(values: Tensor) -> Tensor:
        return torch.cat([x.expand(n) for x, n in zip(values.unbind(), sizes, strict=True)])

    norms = torch.stack(torch._foreach_norm(parts))
    lengths = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    sigma = norms[1::2] / lengths[::2]
    old, restart = [], []
    for index, y in zip(indices, parts[::2], strict=True):
        fresh = _shared_generic_vector(len(v[index]), sums.dtype, sums.device)
        old_u = y if u is None else u[index]
        old += [old_u, v[index]]
        restart += [old_u, fresh]
    # As `_mend` does it.
    usable, is_zero = (
        spread(flags.repeat_interleave(2)) for flags in ((sigma > 0) & (sigma < inf), sigma == 0)
    )
    kept = torch.where(is_zero, torch.cat(restart), torch.cat(old))
    moved = torch.where(usable, sums / spread(lengths), kept).split(sizes)
    for index, *triple in zip(indices, sigma.unbind(), moved[::2], moved[1::2], strict=True):
        results[index] = SingularTriple(*triple)


def _norm(rows: Tensor) -> Tensor:
    """Return the norms of rows (b, n) as (b, 1), never zero: a zero row divided by it stays 0."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(
        torch.finfo(rows.dtype).tiny
    )


def _mend(
    sigma: Tensor, u: tuple[Tensor, Tensor | None], v: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Replace vectors that a zero or non-finite product has spoilt, without reading a value back.

    After a non-finite product the old vectors stay. After a zero product the right vector
    becomes a generic one: the old one may be orthogonal to all that the matrix has left, and
    would then report 0 for ever.

    Args:
        sigma: (b, 1).
        u: new and old left vectors, (b, m) each; None for the old ones if nobody keeps them.
        v: new and old right vectors, (b, n) each.
    """
    (new_u, old_u), (new_v, old_v) = u, v
    fresh = _shared_generic_vector(old_v.shape[1], old_v.dtype, old_v.device)
    usable = (sigma > 0) & (sigma < inf)
    restart = torch.where(sigma == 0, fresh, old_v)
    kept_u = new_u if old_u is None else torch.where(usable, new_u, old_u)
    return kept_u, torch.where(usable, new_v, restart)


_generic_vectors: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _shared_generic_vector(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `generic_vector`, the same tensor each time, to be read only: every step needs it."""
    key = size, dtype, device
    vector = _generic_vectors.get(key)
    if vector is None:
        vector = generic_vector(size, dtype=dtype, device=device)
        if type(vector) is Tensor:  # not a tracer's or a fake one, which die with their mode
            _generic_vectors[key] = vector
    return vector


def generic_vector(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a fixed unit vector (size,) from which a power iteration can start.

    Its entries are cosines of a quadratic phase: it overlaps a constant, an alternating or any
    other periodic vector about as much as a random one does, and needs no random numbers.
    """
    index = torch.arange(1, size + 1, dtype=dtype, device=device)
    vector = torch.cos(index * index)
    return vector / torch.linalg.vector_norm(vector)

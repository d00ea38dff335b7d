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

from hf_stable.measures.matrix_shards import MatrixShard

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
    matrices: Sequence[Tensor | MatrixShard], u: Sequence[Tensor] | None, v: Sequence[Tensor]
) -> list[SingularTriple]:
    """Move each pair of vectors by one power iteration and read sigma off it.

    `u <- normalize(W v)`, `v <- normalize(W.T u)`, `sigma = u.T W v = |W.T u|`
    (Zhai et al. 2023, section 3.3; Qi et al. 2025, section 2). Warm-started from the vectors of
    the step before, one iteration tracks a weight that moves slowly. The estimate never exceeds
    the true sigma_1. Two passes over each matrix; equal shapes share their vector arithmetic; all
    sharded matrices of a process group share one all-reduce, and those whose columns are cut one
    more before it. No host synchronisation. In float32 sigma is right from about 1e-18 to 1e18,
    where its square has a place.

    Args:
        matrices: (m, n) tensors of any floating dtype and strides, or `MatrixShard`s of such.
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
        if isinstance(matrix, MatrixShard):
            groups[matrix.groups].append(index)
        else:
            shapes[(matrix.shape, v[index].dtype, matrix.device)].append(index)
    for indices in shapes.values():
        _step_whole(matrices, u, v, indices, results)
    for shared_by, indices in groups.items():
        _step_shared(matrices, u, v, indices, results, shared_by)
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


def _step_shared(
    matrices: Sequence[Any],
    u: Sequence[Tensor] | None,
    v: Sequence[Tensor],
    indices: list[int],
    results: list[SingularTriple | None],
    groups: Sequence[Any],
) -> None:
    """Step matrices of which each process has a shard, with one all-reduce for all, or two.

    Each rank adds its share of `y = W v` and of `z = W.T y`; then `u = y / |y|`, `v = z / |z|` and
    `sigma = |z| / |y|` follow on every rank from the same sums, bit for bit. Where rows are whole,
    z needs only those entries of y that are complete here. Where columns are cut, y has to be
    summed first: for all such matrices together.
    """
    order = sorted(indices, key=lambda index: not matrices[index].splits_columns)
    shards: list[MatrixShard] = [matrices[index] for index in order]
    sizes = [shard.shape[side] for side in (0, 1) for shard in shards]
    own_v = [v[index] for index in order]
    sums = _sum_products(shards, sizes, own_v, groups)
    own_u = list(sums.split(sizes)[: len(shards)]) if u is None else [u[index] for index in order]
    triples = _normalise_sums(sums, sizes, own_u, own_v)
    for index, triple in zip(order, triples, strict=True):
        results[index] = triple


def _sum_products(
    shards: Sequence[MatrixShard], sizes: list[int], v: Sequence[Tensor], groups: Sequence[Any]
) -> Tensor:
    """Return every `y = W v`, then every `z = W.T y`; shards with cut columns come first."""
    sums = torch.zeros(sum(sizes), dtype=v[0].dtype, device=v[0].device)
    vectors = sums.split(sizes)
    ys, zs = vectors[: len(shards)], vectors[len(shards) :]
    cut = sum(shard.shape[0] for shard in shards if shard.splits_columns)
    with torch.autocast(sums.device.type, enabled=False):
        for shard, own_v, y, z in zip(shards, v, ys, zs, strict=True):
            own = shard.local.to(sums)
            y[shard.rows] = torch.mv(own, own_v.to(sums.dtype)[shard.columns])
            if not shard.splits_columns:
                z[shard.columns] = torch.mv(own.T, y[shard.rows])
        if cut:
            _add_up(sums[:cut], groups)
        for shard, y, z in zip(shards, ys, zs, strict=True):
            if shard.splits_columns:
                z[shard.columns] = torch.mv(shard.local.to(sums).T, y[shard.rows])
    _add_up(sums[cut:], groups)
    return sums


def _normalise_sums(
    sums: Tensor, sizes: list[int], u: list[Tensor], v: list[Tensor]
) -> list[SingularTriple]:
    """Return the triples that `_sum_products` leads to from old u and v, mended as by `_mend`.

    All vectors are one: a kernel's launch costs more than the work on any of them.
    """
    count = len(v)

    def spread(values: Tensor) -> Tensor:
        return torch.cat([x.expand(n) for x, n in zip(values.unbind(), sizes, strict=True)])

    norms = torch.stack(torch._foreach_norm(sums.split(sizes)))
    lengths = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    sigma = norms[count:] / lengths[:count]
    fresh = [_shared_generic_vector(width, sums.dtype, sums.device) for width in sizes[count:]]
    usable, is_zero = (
        spread(torch.cat([flags, flags])) for flags in ((sigma > 0) & (sigma < inf), sigma == 0)
    )
    kept = torch.where(is_zero, torch.cat(u + fresh), torch.cat(u + v))
    moved = torch.where(usable, sums / spread(lengths), kept).split(sizes)
    triples = zip(sigma.unbind(), moved[:count], moved[count:], strict=True)
    return [SingularTriple(*triple) for triple in triples]


def _add_up(sums: Tensor, groups: Sequence[Any]) -> None:
    for group in groups:
        dist.all_reduce(sums, group=group)


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

"""Largest singular values of weights and their vectors: exact at the start, one step after that.

Pure torch, no modules and no optimizers. A weight is a matrix here: `as_matrix` says how a
convolution kernel or a vector becomes one, `split_blocks` how a fused weight becomes several.
Every result is float32, or float64 for float64 input, whatever autocast or the weight says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, inf, prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_stable.measures.products import (
    ov_singular_values,
    qk_singular_values,
    spectral_energy_concentration,
    spectral_energy_curve,
    stable_rank,
)

__all__ = [
    "RowShard",
    "SingularTriple",
    "as_matrix",
    "generic_vector",
    "leading_triple",
    "matrix_blocks",
    "ov_singular_values",
    "power_step",
    "qk_singular_values",
    "spectral_dtype",
    "spectral_energy_concentration",
    "spectral_energy_curve",
    "split_blocks",
    "stable_rank",
]

EXACT_SVD_MAX_DIM = 128
"""Matrices whose shorter side is at most this long get a full SVD; larger ones get Lanczos."""

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


@torch.no_grad()
def leading_triple(
    matrix: Tensor, *, tolerance: float = 1e-6, max_iterations: int = 300
) -> SingularTriple:
    """Compute the largest singular value of a matrix and its vectors, from nothing.

    sigma_1(W) = max |W x| over unit x (Zhai et al. 2023, section 3.3). A full SVD where the
    shorter side is at most `EXACT_SVD_MAX_DIM`; Golub-Kahan-Lanczos iteration beyond, which is
    power iteration that keeps its whole Krylov space: a few dozen products with W reach what
    plain power iteration needs thousands for when two singular values nearly meet.

    Deterministic: the start vector depends on the shape alone, and sigma's sign convention is
    fixed by it. Host synchronisation: yes; this is for set-up, not for the training step.

    Args:
        matrix: (..., m, n), any floating dtype, any strides.
        tolerance: stop when `|W v - sigma u| <= tolerance * sigma`.
        max_iterations: bound on products with W, after which the best pair so far is returned;
            where it is reached the two leading values agree to rounding, so sigma is right and
            v is one vector of their common space.

    Returns:
        `SingularTriple` of shapes (...), (..., m), (..., n). A zero matrix gives sigma 0 with
        unit vectors.

    Raises:
        ValueError: if the matrix is not at least 2-D, is empty, or has a NaN or an infinity.
    """
    if matrix.ndim < 2 or 0 in matrix.shape:
        raise ValueError(f"need a non-empty (..., m, n) matrix, got shape {tuple(matrix.shape)}")
    with torch.autocast(matrix.device.type, enabled=False):
        matrix = matrix.detach().to(spectral_dtype(matrix.dtype))
        if not torch.isfinite(matrix).all():
            raise ValueError(
                f"a {tuple(matrix.shape)} matrix has NaN or infinite entries: its largest "
                "singular value is undefined"
            )
        # Squares of entries beyond 1e19, or below its inverse, leave the range of float32.
        scale = matrix.abs().amax((-2, -1), keepdim=True)
        sigma, u, v = _leading_of_scaled(
            matrix / torch.where(scale > 0, scale, 1.0), tolerance, max_iterations
        )
        return SingularTriple(sigma * scale[..., 0, 0], u, v)


def _leading_of_scaled(matrix: Tensor, tolerance: float, max_iterations: int) -> SingularTriple:
    if min(matrix.shape[-2:]) <= EXACT_SVD_MAX_DIM:
        return _leading_by_svd(matrix)
    if matrix.ndim == 2:
        return _leading_by_lanczos(matrix, tolerance, max_iterations)
    triples = [
        _leading_by_lanczos(block, tolerance, max_iterations) for block in matrix.flatten(0, -3)
    ]
    batch = matrix.shape[:-2]
    return SingularTriple(
        *(torch.stack(part).unflatten(0, batch) for part in zip(*triples, strict=True))
    )


def _leading_by_svd(matrix: Tensor) -> SingularTriple:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return SingularTriple(s[..., 0].clone(), u[..., :, 0].contiguous(), vh[..., 0, :].contiguous())


def _leading_by_lanczos(matrix: Tensor, tolerance: float, max_iterations: int) -> SingularTriple:
    """Golub-Kahan bidiagonalisation with full reorthogonalisation, restarted from its best v."""
    krylov_size = 32
    generator = torch.Generator().manual_seed(matrix.shape[0] * 1_000_003 + matrix.shape[1])
    v = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype).to(matrix.device)
    v = v / torch.linalg.vector_norm(v)
    u = torch.full_like(matrix[:, 0], matrix.shape[0] ** -0.5)
    for _ in range(max(1, max_iterations // krylov_size)):
        v = _best_in_krylov_space(matrix, v, krylov_size)
        triple = power_step([matrix], [u], [v])[0]
        residual = torch.linalg.vector_norm(matrix.mv(triple.v) - triple.sigma * triple.u)
        v = triple.v
        if residual <= tolerance * triple.sigma:
            break
    return triple


def _best_in_krylov_space(matrix: Tensor, v: Tensor, size: int) -> Tensor:
    """Return the unit v in span{v, (W.T W) v, ...} with the largest |W v|."""
    basis, images = [v], [matrix.mv(v)]
    for _ in range(size - 1):
        candidate = matrix.T.mv(images[-1])
        scale = torch.linalg.vector_norm(candidate)
        space = torch.stack(basis)
        # One pass of Gram-Schmidt loses orthogonality in float32; two are enough.
        for _ in range(2):
            candidate = candidate - space.T.mv(space.mv(candidate))
        norm = torch.linalg.vector_norm(candidate)
        if norm <= torch.finfo(matrix.dtype).eps * scale * 10:
            break  # the space is invariant: nothing new can be reached
        basis.append(candidate / norm)
        images.append(matrix.mv(basis[-1]))
    best = torch.linalg.svd(torch.stack(images, dim=1), full_matrices=False).Vh[0]
    v = torch.stack(basis, dim=1).mv(best)
    return v / torch.linalg.vector_norm(v)


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
        _step_together(matrices, u, v, indices, results)
    for group, indices in groups.items():
        _step_sharded(matrices, u, v, indices, results, group)
    return [triple for triple in results if triple is not None]


def _step_together(
    matrices: Sequence[Any],
    u: Sequence[Tensor] | None,
    v: Sequence[Tensor],
    indices: list[int],
    results: list[SingularTriple | None],
) -> None:
    """Step the matrices at `indices`, all of one shape, as one batch where that is cheaper."""
    old_v = torch.stack([v[i] for i in indices])
    own = [matrices[i] for i in indices]
    with torch.autocast(old_v.device.type, enabled=False):
        together: list[Tensor] | Tensor
        transposed: list[Tensor] | Tensor
        if _is_batched(own[0]):
            together = torch.stack(own).to(old_v.dtype)
            transposed = together.mT
        else:
            together = [matrix.to(old_v.dtype) for matrix in own]
            transposed = [matrix.T for matrix in together]
        new_u = _times(together, old_v)
        new_u /= _norm(new_u)
        new_v = _times(transposed, new_u)
        sigma = torch.linalg.vector_norm(new_v, dim=1, keepdim=True)
        new_v /= _norm(new_v)
    old_u = None if u is None else torch.stack([u[i] for i in indices])
    new_u, new_v = _mend(sigma, (new_u, old_u), (new_v, old_v))
    rows = zip(sigma[:, 0].unbind(), new_u.unbind(), new_v.unbind(), strict=True)
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

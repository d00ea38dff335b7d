"""The largest singular value of a matrix and its vectors, computed from nothing.

Pure torch. Every result is float32, or float64 for float64 input, whatever autocast or the weight
says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_stable.measures.matrices import spectral_dtype
from hf_stable.measures.power_iteration import SingularTriple, power_step

__all__ = ["EXACT_SVD_MAX_DIM", "leading_triple"]

EXACT_SVD_MAX_DIM = 128
"""Matrices whose shorter side is at most this long get a full SVD; larger ones get Lanczos."""

KRYLOV_SIZE = 128
"""Vectors of a Krylov space after which the iteration starts again from the best of it."""

CHECKED_EVERY = 8
"""Vectors of a Krylov space between two looks at how far it has come."""


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
        scale = torch.maximum(-matrix.amin((-2, -1)), matrix.amax((-2, -1)))
        if not torch.isfinite(scale).all():
            raise ValueError(
                f"a {tuple(matrix.shape)} matrix has NaN or infinite entries: its largest "
                "singular value is undefined"
            )
        # Squares of entries beyond 1e19, or below its inverse, leave the range of float32. Others
        # need no copy of the matrix.
        scale = torch.where((scale > 0) & ((scale < 1e-9) | (scale > 1e9)), scale, 1.0)
        if not (scale == 1).all():
            matrix = matrix / scale[..., None, None]
        sigma, u, v = _leading_of_scaled(matrix, tolerance, max_iterations)
        return SingularTriple(sigma * scale, u, v)


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
    """Golub-Kahan bidiagonalisation with full reorthogonalisation, restarted from its best v.

    Apart from the block iteration of `tracking`: where a training starts depends on it, so it
    begins from the shape alone and goes on until both vectors are right, not the value alone.
    """
    generator = torch.Generator().manual_seed(matrix.shape[0] * 1_000_003 + matrix.shape[1])
    v = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype).to(matrix.device)
    v = v / torch.linalg.vector_norm(v)
    u = torch.full_like(matrix[:, 0], matrix.shape[0] ** -0.5)
    products = 0
    while True:
        v, used = _best_in_krylov_space(matrix, v, tolerance)
        products += used
        triple = power_step([matrix], [u], [v])[0]
        residual = torch.linalg.vector_norm(matrix.mv(triple.v) - triple.sigma * triple.u)
        v = triple.v
        if residual <= tolerance * triple.sigma or products >= max_iterations:
            return triple


def _best_in_krylov_space(matrix: Tensor, v: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """Return the unit v in span{v, (W.T W) v, ...} with the largest |W v|, and its dimension.

    `W V = U B` with orthonormal V and U and B of two diagonals (Golub and Kahan 1965), of which V
    alone is kept and made orthogonal anew: U is needed for one step (Simon and Zha 2000). The
    space grows until the residual that the last entry of B foretells is within the tolerance.
    """
    basis = matrix.new_empty(KRYLOV_SIZE, len(v))
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    u = matrix.new_zeros(matrix.shape[0])
    tiny = torch.finfo(matrix.dtype).tiny
    for size in range(1, KRYLOV_SIZE + 1):
        basis[size - 1] = v
        image = matrix.mv(v)
        if beside:
            image -= beside[-1] * u
        diagonal.append(torch.linalg.vector_norm(image))
        u = image / diagonal[-1].clamp_min(tiny)
        candidate = matrix.T.mv(u)
        space = basis[:size]
        # One pass of Gram-Schmidt loses orthogonality in float32; two are enough.
        for _ in range(2):
            candidate -= space.T.mv(space.mv(candidate))
        beside.append(torch.linalg.vector_norm(candidate))
        is_whole = beside[-1] <= torch.finfo(matrix.dtype).eps * diagonal[-1] * 10
        if is_whole or size == KRYLOV_SIZE or size % CHECKED_EVERY == 0:
            left, values, right = torch.linalg.svd(_bidiagonal(diagonal, beside))
            if is_whole or beside[-1] * abs(left[-1, 0]) <= tolerance / 2 * values[0]:
                break
        v = candidate / beside[-1]
    v = space.T.mv(right[0].to(v))
    return v / torch.linalg.vector_norm(v), size


def _bidiagonal(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    """Return the square matrix of a diagonal and the one above it, in float64 on the CPU."""
    on_host = torch.stack([*diagonal, *beside]).double().cpu()
    own, above = on_host.chunk(2)
    return torch.diag(own) + torch.diag(above[:-1], 1)

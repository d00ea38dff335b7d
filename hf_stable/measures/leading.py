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
    """Golub-Kahan bidiagonalisation with full reorthogonalisation, restarted from its best v.

    Apart from the block iteration of `tracking`: where a training starts depends on it, so it
    begins from the shape alone and goes on until both vectors are right, not the value alone.
    """
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

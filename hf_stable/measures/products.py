"""Spectra of products of weights that are never formed: Wq^T Wk and Wo Wv per head.

Pure torch. Weights come as (out, in) matrices, the effective ones where a layer is patched;
transpose what a `Conv1D` holds. `hf_stable.spectral` offers the names to users.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "ov_singular_values",
    "qk_singular_values",
    "spectral_energy_concentration",
    "spectral_energy_curve",
    "stable_rank",
]


@torch.no_grad()
def qk_singular_values(wq: Tensor, wk: Tensor, num_heads: int) -> Tensor:
    """Compute the singular values of Wq^T Wk for each head, exactly.

    Attention's logits are `x_i^T (Wq^T Wk) x_j` up to scale and biases (Qi et al. 2025, section
    3.1). With thin QR factorisations `Wq^T = Q R_q`, `Wk^T = Q' R_k` the singular values of the
    d x d product are those of the d_q x d_q matrix `R_q R_k^T`.

    Args:
        wq: (num_heads * d_q, d).
        wk: (kv_heads * d_q, d); kv_heads divides num_heads (grouped-query attention).
        num_heads: number of query heads.

    Returns:
        (num_heads, min(d_q, d)), descending, float32 (float64 for float64 input). NaN for a head
        with a non-finite weight; infinite where a value is beyond the dtype.

    Raises:
        ValueError: if the heads do not divide the rows, or the shapes do not fit each other.
    """
    return _head_singular_values(wq, wk, num_heads)


@torch.no_grad()
def ov_singular_values(wo: Tensor, wv: Tensor, num_heads: int) -> Tensor:
    """Compute the singular values of Wo Wv for each head, exactly.

    Head h writes `Wo_h Wv_h x` to the stream: Wo_h are its columns of Wo, Wv_h its rows of Wv
    (Qi et al. 2025, Eq. 1). Computed as in `qk_singular_values`.

    Args:
        wo: (d, num_heads * d_v).
        wv: (kv_heads * d_v, d); kv_heads divides num_heads.
        num_heads: number of query heads.

    Returns:
        (num_heads, min(d_v, d)), descending, float32 (float64 for float64 input). NaN for a head
        with a non-finite weight; infinite where a value is beyond the dtype.

    Raises:
        ValueError: if the heads do not divide the columns, or the shapes do not fit each other.
    """
    return _head_singular_values(wo.T, wv, num_heads)


@torch.no_grad()
def spectral_energy_concentration(singular_values: Tensor, s: int) -> Tensor:
    """Measure how much of the spectral energy the s largest singular values hold.

    `SEC(d_q, s) = sum_{i<=s} s_i^2 / sum_{i<=d_q} s_i^2` (Qi et al. 2025, Eq. 4). Above 99 % for
    SEC(64, 4) the paper calls a head collapsed; under a small initialisation healthy heads come
    near it too, since the first low-rank updates dwarf the initial weight.

    Args:
        singular_values: (..., d_q), of Wq^T Wk per head, in any order.
        s: how many to count as dominant, 1 to d_q.

    Returns:
        (...), in [s / d_q, 1]. NaN for a zero matrix, which has no energy.

    Raises:
        ValueError: if s is out of range.
    """
    if not 1 <= s <= singular_values.shape[-1]:
        raise ValueError(
            f"s must be between 1 and the {singular_values.shape[-1]} singular values, got {s}"
        )
    energy = _relative_energy(singular_values)
    return (energy.topk(s).values.sum(-1) / energy.sum(-1)).clamp(max=1.0)


@torch.no_grad()
def spectral_energy_curve(singular_values: Tensor) -> Tensor:
    """Measure SEC(d_q, s) for s = 1, 2, 4, ...: Figure 4 of Qi et al. 2025 at the powers of two.

    Args:
        singular_values: (..., d_q), of Wq^T Wk per head, in any order.

    Returns:
        (..., n), of s = 2^i for i = 0 to n - 1, the powers of two up to d_q; never falling. NaN for
        a zero matrix.
    """
    energy = _relative_energy(singular_values).sort(-1, descending=True).values
    sizes = torch.tensor([2**i for i in range(energy.shape[-1].bit_length())], device=energy.device)
    share = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
    return share[..., sizes - 1].clamp(max=1.0)


@torch.no_grad()
def stable_rank(singular_values: Tensor) -> Tensor:
    """Compute the stable rank `sum s_i^2 / s_1^2`: how many directions carry the energy.

    Args:
        singular_values: (..., r), in any order.

    Returns:
        (...), in [1, r]. NaN for a zero matrix.
    """
    return _relative_energy(singular_values).sum(-1)


def _head_singular_values(left: Tensor, right: Tensor, num_heads: int) -> Tensor:
    """Return the singular values of left_h^T right_h for row blocks of (rows, d) matrices."""
    if left.ndim != 2 or right.ndim != 2 or left.shape[0] % num_heads:
        raise ValueError(
            f"cannot cut weights of shapes {tuple(left.shape)} and {tuple(right.shape)} into "
            f"{num_heads} heads"
        )
    size = left.shape[0] // num_heads
    kv_heads = right.shape[0] // max(size, 1)
    if kv_heads * size != right.shape[0] or kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"a weight of {right.shape[0]} rows does not hold heads of size {size} whose number "
            f"divides {num_heads}"
        )
    with torch.autocast(left.device.type, enabled=False):
        factors, scales = [], []
        for weight, heads in ((left, num_heads), (right, kv_heads)):
            weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            blocks = weight.reshape(heads, size, -1)
            # LAPACK refuses NaN in an SVD; a head that has one is set to NaN afterwards.
            finite = (blocks * 0).sum((1, 2)) == 0  # a tenth of the time of `isfinite`
            blocks = torch.where(finite[:, None, None], blocks, 0)
            repeats = num_heads // heads
            # Weights of 1e19 are finite, and their products are not.
            scale = blocks.abs().amax((1, 2))
            scales.append(scale.repeat_interleave(repeats))
            blocks = blocks / torch.where(scale > 0, scale, 1)[:, None, None]
            factor = torch.linalg.qr(blocks.transpose(-1, -2), mode="r").R
            factors.append(
                (factor.repeat_interleave(repeats, 0), finite.repeat_interleave(repeats))
            )
        (r_left, finite_left), (r_right, finite_right) = factors
        values = torch.linalg.svdvals(r_left @ r_right.transpose(-1, -2))
        values = values * scales[0][:, None] * scales[1][:, None]
        return values.masked_fill(~(finite_left & finite_right)[:, None], math.nan)


def _relative_energy(singular_values: Tensor) -> Tensor:
    """Return squares relative to the largest: no overflow, and NaN (0 / 0) for a zero matrix."""
    values = singular_values.to(torch.promote_types(singular_values.dtype, torch.float32))
    return (values / values.amax(-1, keepdim=True)).square()

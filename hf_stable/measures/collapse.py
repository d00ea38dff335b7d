"""How attention maps collapse: their rank, and the modes that the paper tells apart.

Pure torch; maps are given as probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_stable.measures.entropy import attention_entropy, work_dtype

__all__ = ["collapse_mode", "rank_share"]

SPARSE_ENTROPY = 0.1
"""A map is sparse below this share of log T: fewer than two keys a row for T up to 1024. The
paper's simulated modes all lie below 0.003, uniform attention at 1, causal uniform above 0.5."""

MALIGNANT_RANK = 0.15
"""A sparse map is malignant below this `rank_share`. On seeds 0 to 9 of the paper's simulation
malignant maps have .034 to .065, normal ones .36 to .47: this is the geometric middle."""

BENIGN_RANK = 0.6
"""A sparse map is benign above this `rank_share`. Permutations have 1, previous-token maps .64
(5 tokens) to 1, maps that pick random keys 1/2, the paper's normal ones at most .47."""


@torch.no_grad()
def rank_share(maps: Tensor) -> Tensor:
    """Measure the rank of attention maps between 0 (one direction) and 1 (a permutation).

    The participation ratio of the squared singular values, `R = (sum s_i^2)^2 / sum s_i^4`, as
    `(R - 1) / (T - 1)`. It needs no SVD: the sums are Frobenius norms of A and of A^T A.

    Paper: Qi et al. 2025 speak of rank without fixing a measure. The stable rank
    `sum s_i^2 / s_1^2` separates their simulated modes too (shares .11 to .25 normal, .02 to .05
    malignant, 1 benign), but halves as soon as one key is picked twice, which a previous-token
    map always does; the participation ratio does not, and leaves wider gaps.

    Args:
        maps: (..., T, T) attention probabilities. Rows that see no key (NaN or zero) are left out,
            and T is the number of the others.

    Returns:
        (...), float32 (float64 for float64 input). NaN where fewer than two rows are left.
    """
    maps, num_rows = _drop_blind_rows(maps)
    # Rows of length 1 at most keep the sums of fourth powers far from overflow.
    gram = maps.transpose(-1, -2) @ maps
    ratio = maps.square().sum((-2, -1)).square() / gram.square().sum((-2, -1))
    return ((ratio - 1) / (num_rows - 1)).masked_fill(num_rows < 2, math.nan)


def collapse_mode(maps: Tensor) -> list[str]:
    """Tell how attention maps have collapsed, if they have (Qi et al. 2025, Figure 3).

    A map is sparse when its mean entropy is below `SPARSE_ENTROPY * log T`. Sparse maps are
    "malignant" when all rows look at few keys (`rank_share` below `MALIGNANT_RANK`; the mode that
    comes with a crash), "benign" when each row has a key of its own (above `BENIGN_RANK`: nearly
    the identity or a shift). All others are "normal", as is every map of one token.

    Args:
        maps: (..., T, T) attention probabilities, causal and padded ones too; rows that see no
            key (NaN or zero) are left out.

    Returns:
        One of "normal", "benign", "malignant" per map, leading dimensions flattened.

    Raises:
        ValueError: if maps are not square, or one has no row with a visible key.
    """
    if maps.ndim < 2 or maps.shape[-1] != maps.shape[-2]:
        raise ValueError(f"need (..., T, T) attention maps, got shape {tuple(maps.shape)}")
    entropy = attention_entropy(maps).nanmean(-1).flatten()
    if torch.isnan(entropy).any():
        raise ValueError(
            "an attention map has no finite row that sums to 1; pass probabilities, and leave out "
            "maps that are NaN altogether"
        )
    share = rank_share(maps).flatten()
    num_rows = _drop_blind_rows(maps)[1].flatten()
    sparse = entropy < SPARSE_ENTROPY * num_rows.to(entropy.dtype).log()
    return [
        "malignant"
        if is_sparse and rank < MALIGNANT_RANK
        else "benign"
        if is_sparse and rank > BENIGN_RANK
        else "normal"
        for is_sparse, rank in zip(sparse.tolist(), share.tolist(), strict=True)
    ]


def _drop_blind_rows(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Zero the rows that see no key; return the maps and how many rows each has left."""
    maps = maps.to(work_dtype(maps.dtype))
    sums = maps.sum(-1, keepdim=True)
    seeing = torch.isfinite(sums) & (sums > 0)
    return maps.where(seeing, torch.zeros_like(sums)), seeing.sum((-2, -1))

"""How concentrated attention is: the entropy of its rows, and a lower bound for it.

Pure torch, no modules. Natural logarithms (nats) throughout; nothing here is differentiated, and
no T x T matrix is kept where queries and keys are given. Where they come from is the
monitor's matter. A little over three hundred lines, since the entropy of logits, that of queries
and keys, and the count of visible keys have to read a mask in the same way.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "attention_entropy",
    "attention_entropy_from_logits",
    "attention_entropy_from_qk",
    "count_visible_keys",
    "entropy_lower_bound",
    "normalise_entropy",
    "sample_queries",
    "work_dtype",
]

HIDDEN_LOGIT = -1e4
"""A key whose additive mask entry is at most this is not seen at all. Covers -inf, the dtypes'
minima (float16's is -65504) and the customary -1e4 and -1e9; a row of nothing else has no key."""

NEGLIGIBLE_LOGIT = -50.0
"""A key whose additive mask entry is this far below its row's largest does not count as visible.
The softmax still sees it, at a weight of e^-50: Swin hides keys outside a window by -100."""

CHUNK_ELEMENTS = 2**21
"""Largest number of logits that exist at once (8 MiB of float32), unless one row has more."""


@torch.no_grad()
def attention_entropy(probs: Tensor) -> Tensor:
    """Compute the entropy of each row of attention probabilities.

    `Ent(A_i) = -sum_j A_ij log A_ij` (Zhai et al. 2023, section 3.1), with `0 log 0 = 0`: log T
    for a uniform row over T keys, 0 for a one-hot row.

    Args:
        probs: (..., queries, keys), rows that sum to 1; any floating dtype.

    Returns:
        (..., queries) in nats, float32 (float64 for float64 input). NaN where a row sees no key:
        all zero, or NaN as softmax makes it from a row of -inf.
    """
    probs = probs.to(work_dtype(probs.dtype))
    entropy = torch.special.entr(probs).sum(-1)
    return entropy.masked_fill_(probs.sum(-1) == 0, math.nan)


@torch.no_grad()
def attention_entropy_from_logits(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the entropy of each row of `softmax(logits + mask)` without forming the softmax.

    With `z = a - max a` and `Z = sum exp z`, `Ent = log Z - sum z exp(z) / Z`: every term is
    non-negative, so nothing cancels however large the logits are.

    Args:
        logits: (..., queries, keys), scaled already; any floating dtype.
        mask: broadcastable to `logits`; boolean (True: may attend) or floating (added). Entries of
            at most `HIDDEN_LOGIT` hide a key.

    Returns:
        (..., queries) in nats, float32 (float64 for float64 input). NaN where no key is visible.

    Raises:
        ValueError: if the mask does not broadcast to the logits.
    """
    if mask is not None:
        _check_mask(mask, logits.shape)
    work = logits.to(work_dtype(logits.dtype), copy=True)
    return _entropy_in_place(_hide(work, mask))


@torch.no_grad()
def attention_entropy_from_qk(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    queries: Literal["all"] | int | Tensor = "all",
    *,
    softcap: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute the entropy of each attention row from queries and keys, a few rows at a time.

    Exact for the rows that it looks at. Memory: `CHUNK_ELEMENTS` logits and their exponentials
    beside q and k. Products are taken in float32 whatever autocast says.

    Args:
        q: (batch, heads, queries, d).
        k: (batch, kv_heads, keys, d); kv_heads divides heads (grouped-query attention: head h
            reads key head h // (heads / kv_heads)).
        mask: broadcastable to (batch, heads, queries, keys); as in
            `attention_entropy_from_logits`.
        scale: factor on the logits; d ** -0.5 by default.
        is_causal: also hide key j from query i where j > i, aligned at the top left as in
            `torch.nn.functional.scaled_dot_product_attention`.
        queries: "all"; or how many rows to sample (see `sample_queries`); or their indices.
        softcap: cap of the scaled logits, which become `softcap * tanh(logits / softcap)`.
        generator: where the sample is drawn from. Never the global one, so that measuring changes
            no run; without a generator every call draws the same rows.

    Returns:
        (batch, heads, queries or sampled queries) in nats, float32 (float64 for float64 input).
        NaN where no key is visible.

    Raises:
        ValueError: if shapes do not fit, or `queries` is neither "all" nor positive.
    """
    _check_qk(q, k, mask)
    batch, num_heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    rows = sample_queries(num_queries, queries, generator=generator, device=q.device)
    scale = head_dim**-0.5 if scale is None else scale
    chunk = max(1, CHUNK_ELEMENTS // max(1, batch * num_heads * num_keys))
    with torch.autocast(q.device.type, enabled=False):
        dtype = work_dtype(q.dtype)
        keys = k.to(dtype).transpose(-1, -2)
        parts = []
        for some in rows.split(chunk):
            picked = q.index_select(2, some).to(dtype) * scale
            # Query heads that share a key head become rows of one product: no repeated keys.
            logits = (picked.reshape(batch, kv_heads, -1, head_dim) @ keys).view(
                batch, num_heads, len(some), num_keys
            )
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            if is_causal:
                logits.masked_fill_(_future(some, num_keys), -math.inf)
            parts.append(_entropy_in_place(_hide(logits, _mask_rows(mask, some))))
    return torch.cat(parts, dim=2)


def sample_queries(
    num_queries: int,
    queries: Literal["all"] | int | Tensor,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Choose which rows of an attention map to look at.

    A sample of n takes one random position from each of n equal stretches of the sequence: every
    position is as likely as any other, so means over the sample are unbiased, and the spread along
    the sequence, which dominates for causal maps, hardly adds noise.

    Args:
        num_queries: how many rows there are.
        queries: "all"; a number (all rows if it is not below `num_queries`); or indices (n,),
            returned as they are.
        generator: a CPU generator, or None for one that is seeded the same on each call.
        device: where the indices are wanted.

    Returns:
        Ascending indices, int64. Positions on the border of two stretches may come twice.

    Raises:
        ValueError: if `queries` is neither "all" nor a positive number nor a tensor.
    """
    if isinstance(queries, Tensor):
        return queries.to(device)
    is_count = isinstance(queries, int) and not isinstance(queries, bool)
    if queries != "all" and (not is_count or queries < 1):
        raise ValueError(f'queries must be "all", a positive number or indices, got {queries!r}')
    if queries == "all" or queries >= num_queries:
        return torch.arange(num_queries, device=device)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    jitter = torch.rand(queries, generator=generator, dtype=torch.float64)
    picked = (torch.arange(queries) + jitter) * (num_queries / queries)
    return picked.long().clamp_(max=num_queries - 1).to(device)


@torch.no_grad()
def count_visible_keys(
    num_keys: int,
    rows: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Count the keys that each query may attend to: what its entropy is normalised by.

    Args:
        num_keys: length of the map's rows.
        rows: indices of the queries (n,), from `sample_queries`.
        mask: (..., queries or 1, keys or 1), boolean or floating. Of a floating mask, entries more
            than `-NEGLIGIBLE_LOGIT` below the row's largest do not count.
        is_causal: as in `attention_entropy_from_qk`.

    Returns:
        (..., n), int64, with the mask's leading dimensions, or (n,) without a mask.
    """
    visible = ~_future(rows, num_keys) if is_causal else rows.new_ones(len(rows), num_keys).bool()
    mask = _mask_rows(mask, rows)
    if mask is None:
        return visible.sum(-1)
    if mask.dtype == torch.bool:
        return (visible & mask).sum(-1)
    largest = mask.masked_fill(~visible, -math.inf).amax(-1, keepdim=True)
    return (visible & (mask > HIDDEN_LOGIT) & (mask >= largest + NEGLIGIBLE_LOGIT)).sum(-1)


def normalise_entropy(entropy: Tensor, num_keys: Tensor | int) -> Tensor:
    """Divide entropies by their largest possible values, log(num_keys).

    Args:
        entropy: (..., queries) in nats.
        num_keys: visible keys of each row, broadcastable to `entropy`.

    Returns:
        Shares in [0, 1]. NaN where a row sees fewer than two keys: its entropy says nothing.
    """
    keys = torch.as_tensor(num_keys, device=entropy.device)
    share = (entropy / keys.to(entropy.dtype).log()).clamp(max=1.0)
    return share.masked_fill(keys < 2, math.nan)


def entropy_lower_bound(logit_norm: Tensor | float, num_keys: Tensor | int) -> Tensor:
    """Bound the entropy of an attention row from below by the l2 norm of its logits.

    Zhai et al. 2023, Theorem 3.1: with T keys, `|a_i|_2 <= r`, `beta = exp(-r sqrt(T/(T-1)))`,
    `Ent(A_i) >= log(1 + (T-1) beta) + r sqrt(T (T-1)) beta / (1 + (T-1) beta)`. Tight: logits with
    one entry `r sqrt((T-1)/T)` and the others `-r / sqrt(T (T-1))` reach it. The paper's r is
    `scale * sigma_1(Wk Wq^T) * sigma_1(X X^T)`; the norm of the centred logits serves too, since a
    softmax ignores a shift.

    Args:
        logit_norm: r >= 0, any shape.
        num_keys: T >= 1, broadcastable to it.

    Returns:
        Nats, float64 unless `logit_norm` is a tensor of another dtype; 0 for one key.
    """
    if not isinstance(logit_norm, Tensor):
        logit_norm = torch.tensor(logit_norm, dtype=torch.float64)
    norm = logit_norm.to(work_dtype(logit_norm.dtype))
    keys = torch.as_tensor(num_keys, device=norm.device).to(norm.dtype)
    others = keys - 1
    beta = torch.exp(-norm * torch.sqrt(keys / others.clamp_min(1)))
    # exp(-r) outruns r: an infinite norm bounds the entropy by 0, where inf * 0 would be NaN.
    slope = torch.where(beta > 0, norm, beta) * torch.sqrt(keys * others)
    return torch.log1p(others * beta) + slope * beta / (1 + others * beta)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which attention of `dtype` is measured: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _future(rows: Tensor, num_keys: int) -> Tensor:
    """Return (n, keys), True where a key comes after the query."""
    return torch.arange(num_keys, device=rows.device) > rows[:, None]


def _mask_rows(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    if mask is None or mask.shape[-2] == 1:
        return mask
    return mask.index_select(-2, rows)


def _hide(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Apply a mask to logits that may be overwritten."""
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill_(~mask, -math.inf)
    logits += mask
    return logits.masked_fill_(mask <= HIDDEN_LOGIT, -math.inf)


def _entropy_in_place(logits: Tensor) -> Tensor:
    """Return the entropy of each row's softmax, overwriting the logits; NaN for a row of -inf."""
    logits -= logits.amax(-1, keepdim=True)
    # exp(-inf) * -inf would be NaN; the smallest number gives the 0 that a hidden key adds.
    logits.clamp_(min=torch.finfo(logits.dtype).min)
    weights = logits.exp()
    total = weights.sum(-1)
    return total.log() - logits.mul_(weights).sum(-1) / total


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits or mask.ndim < 2:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not broadcast to logits of shape "
            f"{tuple(shape)}; give (batch, 1, 1, keys) for padding"
        )
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(
            f"a mask must be boolean (True: may attend) or floating (added), got {mask.dtype}"
        )


def _check_qk(q: Tensor, k: Tensor, mask: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "need q (batch, heads, queries, d) and k (batch, kv_heads, keys, d), got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if mask is not None:
        _check_mask(mask, torch.Size((*q.shape[:3], k.shape[2])))

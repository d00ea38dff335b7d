"""One call of an attention function, and the map of its first sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from hf_stable.measures.entropy import HIDDEN_LOGIT, sample_queries
from hf_stable.monitor.records import MAP_SIZE

__all__ = ["AttentionCall", "first_maps", "in_bins"]


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function: q (batch, heads, queries, d), k with fewer heads or not.

    Attributes:
        mask: None, boolean, floating or a flex attention `BlockMask`.
        position_bias: added to the logits beside the mask, or None.
        scale: factor on the logits; None for d ** -0.5.
        is_causal: whether keys after the query are hidden beyond what the mask says.
        softcap: cap of the scaled logits, `softcap * tanh(logits / softcap)`, or None.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    mask: Any
    position_bias: Tensor | None
    scale: float | None
    is_causal: bool
    softcap: float | None = None

    def mask_rows(self, rows: Tensor) -> Tensor | None:
        """Return mask, bias and causality of some rows as one mask for these rows, or None.

        Returns:
            Boolean or floating, broadcastable to (batch, heads, rows, keys).
        """
        keys = torch.arange(self.k.shape[2], device=rows.device)
        mask = self.mask
        if isinstance(mask, BlockMask):
            batch = torch.arange(self.q.shape[0], device=rows.device)[:, None, None, None]
            queries = rows[None, None, :, None]
            mask = mask.mask_mod(batch, torch.zeros_like(batch), queries, keys).expand(
                len(batch), -1, len(rows), len(keys)
            )
        elif mask is not None:
            mask = _pick_rows(mask[..., : len(keys)], rows)
        if self.is_causal:
            past = keys <= rows[:, None]
            mask = past if mask is None else _combine(past, mask)
        if self.position_bias is None:
            return mask
        bias = _pick_rows(self.position_bias, rows)
        return bias if mask is None else _combine(mask, bias)


def first_maps(call: AttentionCall, generator: torch.Generator | None) -> Tensor:
    """Return the first sequence's attention, (heads, n, n), of at most `MAP_SIZE` rows and bins.

    Row i is one token of the i-th n-th of the sequence, column j the attention that the j-th n-th
    of the keys gets together: rows still sum to 1, and what is diagonal or one column stays so.
    """
    length = call.q.shape[2]
    size = min(length, MAP_SIZE)
    rows = sample_queries(length, size, generator=generator, device=call.q.device)
    first = replace(call, q=call.q[:1], k=call.k[:1])
    mask = first.mask_rows(rows)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    with torch.autocast(call.q.device.type, enabled=False):
        q = first.q[0].index_select(1, rows).float()
        k = first.k[0].float().repeat_interleave(call.q.shape[1] // call.k.shape[1], 0)
        logits = q @ k.transpose(-1, -2) * scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
    if mask is not None:
        mask = mask.expand(-1, len(q), -1, -1)[0] if mask.ndim == 4 else mask
        hidden = ~mask if mask.dtype == torch.bool else mask <= HIDDEN_LOGIT
        logits = logits if mask.dtype == torch.bool else logits + mask.float()
        logits = logits.masked_fill(hidden, -math.inf)
    return in_bins(logits.softmax(-1))


def in_bins(maps: Tensor) -> Tensor:
    """Return maps (heads, n, keys) with as many columns as rows: keys of one n-th together."""
    size, num_keys = maps.shape[1:]
    bins = torch.arange(num_keys, device=maps.device) * size // num_keys
    return maps.new_zeros(*maps.shape[:2], size).index_add_(-1, bins, maps)


def _pick_rows(mask: Tensor, rows: Tensor) -> Tensor:
    return mask if mask.shape[-2] == 1 else mask.index_select(-2, rows)


def _combine(mask: Tensor, other: Tensor) -> Tensor:
    """Return the mask that hides what either hides and adds what either adds."""
    if mask.dtype != torch.bool:
        return mask + other
    return mask & other if other.dtype == torch.bool else other.masked_fill(~mask, -math.inf)

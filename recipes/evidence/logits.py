"""The largest logit of each head, as attention makes it in training."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["take", "watch"]

WATCHED = "sdpa_with_largest_logits"

_largest: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def watch(model: Any) -> None:
    """Have a model's attentions keep the largest logit of each head, in training, in place."""
    AttentionInterface.register(WATCHED, _attend)
    AttentionMaskInterface.register(WATCHED, sdpa_mask)
    model.set_attn_implementation(WATCHED)


def take(attention: nn.Module) -> Tensor:
    """Return an attention's largest logits since the last call, (heads,), and forget them.

    Raises:
        KeyError: if there was no forward in training since.
    """
    return _largest.pop(attention)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if module.training:
        largest = _largest_of(query.detach(), key.detach(), mask, scaling, module)
        if module in _largest:
            largest = torch.maximum(largest, _largest[module])
        _largest[module] = largest
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)


def _largest_of(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, module: nn.Module
) -> Tensor:
    """Return (heads,), over what a query may look at; scores before the softmax."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query @ key.mT * scale
    if mask is not None:
        logits = (
            logits + mask if mask.is_floating_point() else logits.masked_fill(~mask, -torch.inf)
        )
    elif getattr(module, "is_causal", False):
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    return logits.amax((0, 2, 3))

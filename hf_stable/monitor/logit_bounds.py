"""How large attention's logits can be: by the spectra of weights and the norms of tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hf_stable.architectures.description import Attention
from hf_stable.architectures.finding import FoundBlock
from hf_stable.measures.entropy import NEGLIGIBLE_LOGIT
from hf_stable.monitor.attention_call import AttentionCall
from hf_stable.monitor.block_terms import query_bias_reach
from hf_stable.monitor.block_weights import AttentionWeights

__all__ = ["LogitBounds"]

NORM_ITERATIONS = 30
"""Power iterations for sigma_1 of the tokens; their mean direction leads by far."""


class LogitBounds:
    """Collects what bounds the norm of a row of logits, of each layer that has plain ones."""

    def __init__(self) -> None:
        """Begin with no layer."""
        self._attentions: dict[str, Attention] = {}
        # Projections whose inputs are needed: of queries, and of keys that are others'.
        self._queries_of: dict[nn.Module, str] = {}
        self._keys_of: dict[nn.Module, str] = {}
        self._reach: dict[str, tuple[Tensor, Tensor]] = {}
        # By thread and layer: replicas run beside each other.
        self._token_norms: dict[tuple[int, str], Tensor] = {}
        self._key_norms: dict[tuple[int, str], Tensor] = {}

    def __bool__(self) -> bool:
        """Say whether any layer is bounded."""
        return bool(self._attentions)

    def expect(self, found: FoundBlock, attention: Attention, layer: str) -> None:
        """Prepare for a block's attention, if its logits are plain products."""
        if found.has_plain_logits(attention):
            self._attentions[layer] = attention
            self._queries_of[found.module.get_submodule(attention.query)] = layer
            if attention.is_cross:
                self._keys_of[found.module.get_submodule(attention.key)] = layer

    def watched(self) -> Iterator[nn.Module]:
        """Yield the modules whose input has to be shown to `take_tokens`."""
        yield from self._queries_of
        yield from self._keys_of

    def layers_of(self, module: nn.Module) -> list[str]:
        """Return the layers whose queries or keys a module makes."""
        return [of[module] for of in (self._queries_of, self._keys_of) if module in of]

    def take_tokens(self, module: nn.Module, tokens: Tensor) -> None:
        """Measure the tokens (batch, n, d) that enter such a module."""
        here = threading.get_ident()
        if module in self._queries_of:
            self._token_norms[here, self._queries_of[module]] = _token_norms(tokens)
        if module in self._keys_of:
            self._key_norms[here, self._keys_of[module]] = _token_norms(tokens)

    def take_weights(self, block: FoundBlock, layer: str, sigma: Tensor) -> None:
        """Take sigma_1(Wq^T Wk) of each head of a layer, (heads,); others are let pass."""
        if layer in self._attentions:
            attention = self._attentions[layer]
            scale = AttentionWeights(block.module, attention).query_scale
            self._reach[layer] = (scale * sigma, scale * query_bias_reach(block, attention))

    def norm(self, call: AttentionCall, layer: str, mask: Tensor | None) -> Tensor | None:
        """Bound the norms of the logits' rows, (batch, heads, 1 or rows); None where unknown."""
        here = threading.get_ident(), layer
        if here not in self._token_norms or layer not in self._reach:
            return None
        sigma, bias = (reach.to(call.q.device) for reach in self._reach[layer])
        largest, longest = self._token_norms[here].unsqueeze(-1).unbind()
        if here in self._key_norms:
            largest = self._key_norms[here][0].unsqueeze(-1)
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        # Paper: |x_i| of the longest token instead of another sigma_1(X), which is larger.
        norm = (scale * largest * (sigma * longest + bias)).unsqueeze(-1)
        if mask is None or mask.dtype == torch.bool:
            return norm
        seen = mask.masked_fill(mask < mask.amax(-1, keepdim=True) + NEGLIGIBLE_LOGIT, 0.0)
        return norm + torch.linalg.vector_norm(seen, dim=-1).to(norm)


def _token_norms(tokens: Tensor) -> Tensor:
    """Return sigma_1(X) and the longest token of each sequence, (2, batch), of (batch, n, d)."""
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.float()
        vector = tokens.sum(1, keepdim=True)
        for _ in range(NORM_ITERATIONS):
            vector = (tokens @ vector.transpose(1, 2)).transpose(1, 2) @ tokens
            vector = vector / torch.linalg.vector_norm(vector, dim=2, keepdim=True)
        largest = torch.linalg.vector_norm(tokens @ vector.transpose(1, 2), dim=(1, 2))
        return torch.stack([largest, torch.linalg.vector_norm(tokens, dim=2).amax(1)])

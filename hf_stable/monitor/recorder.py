"""The recorder that fills a probe's records from what it is shown.

Measures come from `entropy` and `block_terms`. `probing` makes the model show what is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from hf_stable.architectures.description import Attention
from hf_stable.architectures.finding import FoundBlock
from hf_stable.architectures.paths import state_dict_name
from hf_stable.measures.collapse import collapse_mode, rank_share
from hf_stable.measures.entropy import (
    HIDDEN_LOGIT,
    NEGLIGIBLE_LOGIT,
    attention_entropy_from_qk,
    count_visible_keys,
    entropy_lower_bound,
    normalise_entropy,
    sample_queries,
)
from hf_stable.monitor.block_terms import query_bias_reach, weight_terms
from hf_stable.monitor.block_weights import AttentionWeights
from hf_stable.monitor.records import MAP_SIZE, Records
from hf_stable.monitor.terms import TERMS, names_of

__all__ = ["AttentionCall", "Recorder", "is_recomputing"]

ROWS_AT_ONCE = 256

NORM_ITERATIONS = 30
"""Power iterations for sigma_1 of the tokens; their mean direction leads by far."""


def is_recomputing() -> bool:
    """Say whether a backward runs: what a model does then repeats a forward for checkpointing."""
    return torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function: q (batch, heads, queries, d), k with fewer heads or not.

    Attributes:
        mask: None, boolean, floating or a flex attention `BlockMask`.
        position_bias: added to the logits beside the mask, or None.
        is_causal: whether keys after the query are hidden beyond what the mask says.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    mask: Any
    position_bias: Tensor | None
    scale: float | None
    is_causal: bool

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


class Recorder:
    """Fills `Records` from the inputs and attention calls of one model.

    Attributes:
        records: what has been recorded so far.
        ran_forward: whether a forward of the whole model was heard of.
        called_attention: whether a call of attention was, recorded or not.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[FoundBlock],
        terms: frozenset[str],
        *,
        queries: Literal["all"] | int,
        maps: Literal["all"] | Sequence[int],
        generator: torch.Generator | None,
    ) -> None:
        """Prepare to record `terms` of a model with the given blocks; touch nothing yet."""
        sample_queries(1, queries)  # refuses a bad value before anything runs
        self.records = Records()
        self.ran_forward = False
        self.called_attention = False
        self._terms = terms
        self._queries = queries
        self._maps = maps
        self._generator = generator
        self._totals: dict[tuple[str, str], Tensor] = {}
        self._names = {m: state_dict_name(name) for name, m in model.named_modules()}
        self._blocks = {found.module: found for found in blocks}
        self._layers: dict[nn.Module, str] = {}
        # Projections whose inputs the bound needs: of queries, and of keys that are others'.
        self._queries_of: dict[nn.Module, str] = {}
        self._keys_of: dict[nn.Module, str] = {}
        self._measured: set[str] = set()
        self._mapped: set[str] = set()
        # Within a reentrant checkpoint the first forward builds no graph; recomputation does.
        self._without_gradient: set[str] = set()
        self._reach: dict[str, tuple[Tensor, Tensor]] = {}
        self._token_norms: dict[str, Tensor] = {}
        self._key_norms: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._bounded: dict[str, Attention] = {}
        for found in blocks:
            for name, attention in found.attentions():
                self._layers[found.module.get_submodule(attention.module)] = name
                if "entropy_bound" in terms and found.has_plain_logits(attention):
                    self._bounded[name] = attention
                    self._queries_of[found.module.get_submodule(attention.query)] = name
                    if attention.is_cross:
                        self._keys_of[found.module.get_submodule(attention.key)] = name

    def watched_inputs(self) -> Iterator[nn.Module]:
        """Yield the modules whose input has to be shown to `observe_input`."""
        yield from self._blocks
        yield from self._queries_of
        yield from self._keys_of

    def close(self) -> None:
        """Stop listening to gradients still to come; put those that came into model order."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for term in ("norm_dx", "nonfinite_dx"):
            found = getattr(self.records, term)
            names = [block.name for block in self._blocks.values()]
            in_order = {name: found[name] for name in names if name in found}
            setattr(self.records, term, in_order)

    @torch.no_grad()
    def observe_input(self, module: nn.Module, tokens: Tensor) -> None:
        """Record the tokens (batch, tokens, features) that enter a block or its projection."""
        recomputing = is_recomputing()
        if module in self._queries_of and not recomputing:
            self._token_norms[self._queries_of[module]] = _token_norms(tokens.detach())
        if module in self._keys_of and not recomputing:
            self._key_norms[self._keys_of[module]] = _token_norms(tokens.detach())
        if module not in self._blocks:
            return
        block = self._blocks[module]
        layer = block.name
        if not recomputing:
            if layer not in self._measured:
                self._measured.add(layer)
                self._measure_weights(block)
            self._observe_tokens("x", layer, tokens.detach())
            self._without_gradient.add(layer)
        if tokens.requires_grad and layer in self._without_gradient:
            self._without_gradient.remove(layer)
            self._handles.append(
                tokens.register_hook(lambda g: self._observe_tokens("dx", layer, g.detach()))
            )

    def _measure_weights(self, block: FoundBlock) -> None:
        wanted = self._terms & set(names_of(seen=("weights",)))
        bounded = {"sigma_qk"} if self._bounded else set()
        for layer, terms in weight_terms(block, wanted | bounded).items():
            for term, value in terms.items():
                if term in wanted:
                    getattr(self.records, term)[layer] = value.float()
            if layer in self._bounded:
                attention = self._bounded[layer]
                scale = AttentionWeights(block.module, attention).query_scale
                reach = (terms["sigma_qk"], query_bias_reach(block, attention))
                self._reach[layer] = (scale * reach[0], scale * reach[1])

    @torch.no_grad()
    def _observe_tokens(self, what: str, layer: str, tokens: Tensor) -> None:
        norm, nonfinite = f"norm_{what}", f"nonfinite_{what}"
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if norm in self._terms:
            self._add(norm, layer, torch.linalg.vector_norm(tokens), torch.ones(()))
        if nonfinite in self._terms:
            counts = getattr(self.records, nonfinite)
            counts[layer] = counts.get(layer, 0) + (~tokens.isfinite()).sum().float()

    @torch.no_grad()
    def observe_attention(self, call: AttentionCall) -> None:
        """Record entropy, its bound and the shape of the map of one attention call."""
        if not self._maps and not any("attention" in TERMS[term].needs for term in self._terms):
            return
        layer = self._layers.get(call.module, self._names[call.module])
        rows = sample_queries(
            call.q.shape[2], self._queries, generator=self._generator, device=call.q.device
        )
        # In pieces: a mask of all rows at once would be the matrix that nothing else here keeps.
        for some in rows.split(ROWS_AT_ONCE):
            mask = call.mask_rows(some)
            entropy = attention_entropy_from_qk(
                call.q.index_select(2, some), call.k, mask, call.scale
            )
            keys = count_visible_keys(call.k.shape[2], torch.arange(len(some)).to(some), mask)
            self._add_rows("entropy", layer, entropy)
            self._add_rows("entropy_normalised", layer, normalise_entropy(entropy, keys))
            if layer in self._token_norms:
                norm = self._logit_norm(call, layer, mask)
                bound = entropy_lower_bound(norm, keys.clamp_min(1)).expand_as(entropy)
                self._add_rows("entropy_bound", layer, bound.masked_fill(entropy.isnan(), math.nan))
        if layer not in self._mapped:
            self._mapped.add(layer)
            self._observe_map(call, layer)

    def _logit_norm(self, call: AttentionCall, layer: str, mask: Tensor | None) -> Tensor:
        """Bound the norms of the logits' rows by the spectra, (batch, heads, 1 or rows)."""
        sigma, bias = self._reach[layer]
        largest, longest = self._token_norms[layer].unsqueeze(-1).unbind()
        if layer in self._key_norms:
            largest = self._key_norms[layer][0].unsqueeze(-1)
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        # Paper: |x_i| of the longest token instead of another sigma_1(X), which is larger.
        norm = (scale * largest * (sigma * longest + bias)).unsqueeze(-1)
        if mask is None or mask.dtype == torch.bool:
            return norm
        seen = mask.masked_fill(mask < mask.amax(-1, keepdim=True) + NEGLIGIBLE_LOGIT, 0.0)
        return norm + torch.linalg.vector_norm(seen, dim=-1).to(norm)

    def _observe_map(self, call: AttentionCall, layer: str) -> None:
        if not self._maps and self._terms.isdisjoint(("rank", "mode")):
            return
        maps = _first_maps(call, self._generator)
        if "rank" in self._terms:
            self.records.rank[layer] = rank_share(maps)
        if "mode" in self._terms:
            defined = maps.isfinite().all(-1).any(-1).tolist()
            self.records.mode[layer] = [
                collapse_mode(one)[0] if is_defined else "undefined"
                for one, is_defined in zip(maps, defined, strict=True)
            ]
        if self._maps == "all":
            self.records.maps[layer] = maps
        elif self._maps:
            # Layers may have more heads than others, as Swin's later ones do.
            self.records.maps[layer] = maps[[head for head in self._maps if head < len(maps)]]

    def _add_rows(self, term: str, layer: str, values: Tensor) -> None:
        """Add values (batch, heads, rows) to a mean per head; NaN marks rows to leave out."""
        if term in self._terms:
            self._add(term, layer, values.nansum((0, 2)), (~values.isnan()).sum((0, 2)))

    def _add(self, term: str, layer: str, total: Tensor, count: Tensor) -> None:
        counts = self.records.counts.setdefault(term, {})
        if layer in counts:
            total, count = self._totals[term, layer] + total, counts[layer] + count
        self._totals[term, layer], counts[layer] = total, count
        getattr(self.records, term)[layer] = (total / count).float()


def _first_maps(call: AttentionCall, generator: torch.Generator | None) -> Tensor:
    """Return the first sequence's attention, (heads, n, n), of at most `MAP_SIZE` rows and bins.

    Row i is one token of the i-th n-th of the sequence, column j the attention that the j-th n-th
    of the keys gets together: rows still sum to 1, and what is diagonal or one column stays so.
    """
    length, num_keys = call.q.shape[2], call.k.shape[2]
    size = min(length, MAP_SIZE)
    rows = sample_queries(length, size, generator=generator, device=call.q.device)
    first = replace(call, q=call.q[:1], k=call.k[:1])
    mask = first.mask_rows(rows)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    with torch.autocast(call.q.device.type, enabled=False):
        q = first.q[0].index_select(1, rows).float()
        k = first.k[0].float().repeat_interleave(call.q.shape[1] // call.k.shape[1], 0)
        logits = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        mask = mask.expand(-1, len(q), -1, -1)[0] if mask.ndim == 4 else mask
        hidden = ~mask if mask.dtype == torch.bool else mask <= HIDDEN_LOGIT
        logits = logits if mask.dtype == torch.bool else logits + mask.float()
        logits = logits.masked_fill(hidden, -math.inf)
    bins = torch.arange(num_keys, device=logits.device) * size // num_keys
    empty = logits.new_zeros(*logits.shape[:2], size)
    return empty.index_add_(-1, bins, logits.softmax(-1))


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


def _pick_rows(mask: Tensor, rows: Tensor) -> Tensor:
    return mask if mask.shape[-2] == 1 else mask.index_select(-2, rows)


def _combine(mask: Tensor, other: Tensor) -> Tensor:
    """Return the mask that hides what either hides and adds what either adds."""
    if mask.dtype != torch.bool:
        return mask + other
    return mask & other if other.dtype == torch.bool else other.masked_fill(~mask, -math.inf)

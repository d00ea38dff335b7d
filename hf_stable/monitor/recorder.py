"""The recorder that fills a probe's records from what it is shown.

Longer than others: all of it works on the same sums.

Measures come from `entropy` and `block_terms`. `observing` makes the model show what is recorded. A
measure that fails is a missing value with a reason: it never ends a forward.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_stable.architectures.description import Attention
from hf_stable.architectures.finding import FoundBlock
from hf_stable.architectures.paths import state_dict_name
from hf_stable.measures.collapse import collapse_mode, rank_share
from hf_stable.measures.entropy import (
    NEGLIGIBLE_LOGIT,
    attention_entropy_from_qk,
    count_visible_keys,
    entropy_lower_bound,
    normalise_entropy,
    sample_queries,
)
from hf_stable.monitor.attention_call import AttentionCall, first_maps
from hf_stable.monitor.block_terms import query_bias_reach, weight_terms
from hf_stable.monitor.block_weights import AttentionWeights
from hf_stable.monitor.missing import reason_of
from hf_stable.monitor.records import Records
from hf_stable.monitor.terms import TERMS, names_of

__all__ = ["Recorder", "is_recomputing"]

ROWS_AT_ONCE = 256

NORM_ITERATIONS = 30
"""Power iterations for sigma_1 of the tokens; their mean direction leads by far."""


def is_recomputing() -> bool:
    """Say whether a backward runs: what a model does then repeats a forward for checkpointing."""
    return torch._C._current_graph_task_id() != -1


class Recorder:
    """Fills `Records` from the inputs and attention calls of one model.

    The replicas that nn.DataParallel makes of a model run in threads, each with a part of the
    batch; what they show is recorded as one forward's, one at a time.

    Attributes:
        records: what has been recorded so far.
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
        self._terms = terms
        self._queries = queries
        self._maps = maps
        self._generators = _Generators(generator)
        self._lock = threading.RLock()
        self._totals: dict[tuple[str, str], Tensor] = {}
        self._squares: dict[tuple[str, str], Tensor] = {}
        self._names = {m: state_dict_name(name) for name, m in model.named_modules()}
        self._blocks = {found.module: found for found in blocks}
        self._layers: dict[nn.Module, str] = {}
        # Projections whose inputs the bound needs: of queries, and of keys that are others'.
        self._queries_of: dict[nn.Module, str] = {}
        self._keys_of: dict[nn.Module, str] = {}
        self._measured: set[str] = set()
        self._mapped: set[str] = set()
        # Within a reentrant checkpoint the first forward builds no graph; recomputation does.
        self._without_gradient: Counter[str] = Counter()
        self._reach: dict[str, tuple[Tensor, Tensor]] = {}
        # By thread and layer: replicas run beside each other.
        self._token_norms: dict[tuple[int, str], Tensor] = {}
        self._key_norms: dict[tuple[int, str], Tensor] = {}
        self._handles: list[Any] = []
        self._bounded: dict[str, Attention] = {}
        for found in blocks:
            self._name_attention(found)

    def _name_attention(self, found: FoundBlock) -> None:
        """Name a block's attention, and note what its bound needs."""
        for name, attention in found.attentions():
            self._layers[found.module.get_submodule(attention.module)] = name
            if "entropy_bound" in self._terms and found.has_plain_logits(attention):
                self._bounded[name] = attention
                self._queries_of[found.module.get_submodule(attention.query)] = name
                if attention.is_cross:
                    self._keys_of[found.module.get_submodule(attention.key)] = name

    @property
    def wants_attention(self) -> bool:
        """Whether anything is to be measured of attention."""
        return bool(self._maps) or any("attention" in TERMS[term].needs for term in self._terms)

    def name_of(self, module: nn.Module) -> str:
        """Return the layer that a module's attention is recorded as."""
        return self._layers.get(module, self._names[module])

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
        self.finish_replicas()
        for term in ("norm_dx", "nonfinite_dx"):
            found = getattr(self.records, term)
            names = [block.name for block in self._blocks.values()]
            in_order = {name: found[name] for name in names if name in found}
            setattr(self.records, term, in_order)
        for term, layers in self.records.missing.items():
            for layer in layers:  # what was there when it failed is no mean of all
                getattr(self.records, term).pop(layer, None)

    @contextmanager
    def bearing(self, layer: str, *terms: str) -> Iterator[None]:
        """Turn an error within the block into missing values of these terms, with its reason."""
        try:
            yield
        except Exception as error:
            for term in set(terms) & self._terms:
                self.records.missing.setdefault(term, {}).setdefault(layer, reason_of(error))

    @torch.no_grad()
    def observe_input(self, module: nn.Module, tokens: Tensor, *, is_replica: bool = False) -> None:
        """Record the tokens (batch, tokens, features) that enter a block or its projection.

        Args:
            module: the model's own, also where a replica of it ran.
            tokens: what enters.
            is_replica: whether a replica ran, with a part of the batch.
        """
        recomputing = is_recomputing()
        with self._lock:
            if not recomputing:
                for norms, layers in (
                    (self._token_norms, self._queries_of), (self._key_norms, self._keys_of),
                ):  # fmt: skip
                    if module in layers:
                        layer = layers[module]
                        with self.bearing(layer, "entropy_bound"):
                            norms[threading.get_ident(), layer] = _token_norms(tokens.detach())
            if module in self._blocks:
                self._observe_block(self._blocks[module], tokens, recomputing, is_replica)

    def _observe_block(
        self, block: FoundBlock, tokens: Tensor, recomputing: bool, is_replica: bool
    ) -> None:
        layer = block.name
        if not recomputing:
            if layer not in self._measured:
                self._measured.add(layer)
                self._measure_weights(block)
            self._observe_tokens("x", layer, tokens.detach(), is_replica)
            self._without_gradient[layer] += 1
        if tokens.requires_grad and self._without_gradient[layer]:
            self._without_gradient[layer] -= 1
            self._handles.append(
                tokens.register_hook(
                    lambda g: self._observe_tokens("dx", layer, g.detach(), is_replica)
                )
            )

    def _measure_weights(self, block: FoundBlock) -> None:
        wanted = self._terms & set(names_of(seen=("weights",)))
        bounded = {"sigma_qk"} if self._bounded else set()
        for layer, terms in weight_terms(block, wanted | bounded, self.bearing).items():
            for term, value in terms.items():
                if term in wanted:
                    getattr(self.records, term)[layer] = value.float()
            if layer in self._bounded and "sigma_qk" in terms:
                with self.bearing(layer, "entropy_bound"):
                    attention = self._bounded[layer]
                    scale = AttentionWeights(block.module, attention).query_scale
                    reach = (terms["sigma_qk"], query_bias_reach(block, attention))
                    self._reach[layer] = (scale * reach[0], scale * reach[1])

    @torch.no_grad()
    def _observe_tokens(self, what: str, layer: str, tokens: Tensor, is_replica: bool) -> None:
        norm, nonfinite = f"norm_{what}", f"nonfinite_{what}"
        with self._lock, self.bearing(layer, norm, nonfinite):
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            if norm in self._terms:
                self._add_norm(norm, layer, torch.linalg.vector_norm(tokens), is_replica)
            if nonfinite in self._terms:
                counts = getattr(self.records, nonfinite)
                count = (~tokens.isfinite()).sum().float()
                counts[layer] = (
                    counts[layer] + count.to(counts[layer]) if layer in counts else count
                )

    def _add_norm(self, term: str, layer: str, norm: Tensor, is_replica: bool) -> None:
        if not is_replica:
            return self._add(term, layer, norm, torch.ones(()))
        key = term, layer
        square = norm.square()
        known = self._squares.get(key)
        self._squares[key] = square if known is None else known + square.to(known)
        return None

    def finish_replicas(self) -> None:
        """Take what replicas showed so far as one forward: their norms are of parts of a batch."""
        with self._lock:
            for (term, layer), squares in self._squares.items():
                self._add(term, layer, squares.sqrt(), torch.ones(()))
            self._squares.clear()

    @torch.no_grad()
    def observe_attention(self, call: AttentionCall, *, is_first: bool = True) -> None:
        """Record entropy, its bound and the shape of the map of one attention call.

        Args:
            call: of the model's own module, also where a replica of it ran.
            is_first: whether it has the first sequence of the batch.
        """
        if not self.wants_attention:
            return
        layer = self.name_of(call.module)
        with self._lock:
            generator = self._generators.on(call.q.device)
            with self.bearing(layer, "entropy", "entropy_normalised", "entropy_bound"):
                self._observe_entropy(call, layer, generator)
            if is_first and layer not in self._mapped:
                self._mapped.add(layer)
                with self.bearing(layer, "rank", "mode"):
                    self._observe_map(call, layer, generator)

    def _observe_entropy(
        self, call: AttentionCall, layer: str, generator: torch.Generator | None
    ) -> None:
        rows = sample_queries(
            call.q.shape[2], self._queries, generator=generator, device=call.q.device
        )
        # In pieces: a mask of all rows at once would be the matrix that nothing else here keeps.
        for some in rows.split(ROWS_AT_ONCE):
            mask = call.mask_rows(some)
            entropy = attention_entropy_from_qk(
                call.q.index_select(2, some), call.k, mask, call.scale, softcap=call.softcap
            )
            keys = count_visible_keys(call.k.shape[2], torch.arange(len(some)).to(some), mask)
            self._add_rows("entropy", layer, entropy)
            self._add_rows("entropy_normalised", layer, normalise_entropy(entropy, keys))
            if (threading.get_ident(), layer) in self._token_norms and layer in self._reach:
                norm = self._logit_norm(call, layer, mask)
                bound = entropy_lower_bound(norm, keys.clamp_min(1)).expand_as(entropy)
                self._add_rows("entropy_bound", layer, bound.masked_fill(entropy.isnan(), math.nan))

    def _logit_norm(self, call: AttentionCall, layer: str, mask: Tensor | None) -> Tensor:
        """Bound the norms of the logits' rows by the spectra, (batch, heads, 1 or rows)."""
        here = threading.get_ident(), layer
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

    def _observe_map(
        self, call: AttentionCall, layer: str, generator: torch.Generator | None
    ) -> None:
        if not self._maps and self._terms.isdisjoint(("rank", "mode")):
            return
        maps = first_maps(call, generator)
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
            known = self._totals[term, layer]
            total, count = known + total.to(known), counts[layer] + count.to(counts[layer])
        self._totals[term, layer], counts[layer] = total, count
        getattr(self.records, term)[layer] = (total / count).float()


class _Generators:
    """The generator of sampled rows, on each device the same from its beginning.

    Replicas on several devices ask in any order, and each is to draw what it drew the last time.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self._given = generator
        self._start = None if generator is None else generator.get_state()
        self._by_device: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator | None:
        """Return the generator for calls on a device."""
        if self._given is None or self._start is None:
            return None
        if device not in self._by_device:
            own = self._given if not self._by_device else torch.Generator().set_state(self._start)
            self._by_device[device] = own
        return self._by_device[device]


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

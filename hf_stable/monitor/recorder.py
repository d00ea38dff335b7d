"""The recorder that fills a probe's records from what it is shown.

`observing` makes the model show what is recorded. A measure that fails is a missing value with a
reason: it never ends a forward.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_stable.architectures.finding import FoundBlock
from hf_stable.architectures.paths import state_dict_name
from hf_stable.monitor.attention_call import AttentionCall
from hf_stable.monitor.attention_terms import AttentionTerms
from hf_stable.monitor.block_terms import weight_terms
from hf_stable.monitor.call_names import CallNames
from hf_stable.monitor.logit_bounds import LogitBounds
from hf_stable.monitor.missing import reason_of
from hf_stable.monitor.records import Records
from hf_stable.monitor.sums import Sums
from hf_stable.monitor.terms import TERMS, names_of

__all__ = ["Recorder", "is_recomputing"]


def is_recomputing() -> bool:
    """Say whether a backward runs: what a model does then repeats a forward for checkpointing."""
    return torch._C._current_graph_task_id() != -1


class Recorder:
    """Fills `Records` from the inputs and attention calls of one model.

    The replicas that nn.DataParallel makes of a model run in threads, each with a part of the
    batch; what they show is recorded as one forward's, one at a time.

    Attributes:
        records: what has been recorded so far.
        wants_attention: whether anything is to be measured of attention.
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
        self.records = Records()
        self._terms = terms
        self._sums = Sums(self.records, terms)
        self._bounds = LogitBounds()
        self._attention = AttentionTerms(
            terms, self._sums, self._bounds, queries=queries, maps=maps, generator=generator
        )
        self.wants_attention = bool(maps) or any("attention" in TERMS[t].needs for t in terms)
        self._lock = threading.RLock()
        self._is_paused = threading.local()  # replicas run in threads
        self._calls = CallNames(blocks)
        self._names = {m: state_dict_name(name) for name, m in model.named_modules()}
        self._blocks = {found.module: found for found in blocks}
        self._layers: dict[nn.Module, str] = {}
        self._measured: set[str] = set()
        self._mapped: set[str] = set()
        # Within a reentrant checkpoint the first forward builds no graph; recomputation does.
        self._without_gradient: Counter[str] = Counter()
        self._handles: list[Any] = []
        for found in blocks:
            for name, attention in found.attentions():
                self._layers[found.module.get_submodule(attention.module)] = name
                if "entropy_bound" in terms:
                    self._bounds.expect(found, attention, name)

    def name_of(self, module: nn.Module) -> str:
        """Return the layer that a module's attention is recorded as."""
        return self._layers.get(module, self._names[module])

    def watched_inputs(self) -> Iterator[nn.Module]:
        """Yield the modules whose input has to be shown to `observe_input`."""
        yield from self._blocks
        yield from self._bounds.watched()

    def begin_forward(self) -> None:
        """Count the calls of shared layers from one again."""
        with self._lock:
            self._calls.begin()

    def close(self) -> None:
        """Stop listening to gradients still to come; put those that came into model order."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.finish_replicas()
        for term in ("norm_dx", "nonfinite_dx"):
            found = getattr(self.records, term)
            order = {block.name: i for i, block in enumerate(self._blocks.values())}
            calls = {name: name.partition("@") for name in found}
            names = sorted(calls, key=lambda n: (order[calls[n][0]], int(calls[n][2] or 0)))
            in_order = {name: found[name] for name in names}
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take no notice of inputs within the block: it repeats what has been shown already."""
        self._is_paused.on = True
        try:
            yield
        finally:
            self._is_paused.on = False

    @torch.no_grad()
    def observe_input(self, module: nn.Module, tokens: Tensor, *, is_replica: bool = False) -> None:
        """Record the tokens (batch, tokens, features) that enter a block or its projection.

        Args:
            module: the model's own, also where a replica of it ran.
            tokens: what enters.
            is_replica: whether a replica ran, with a part of the batch.
        """
        if getattr(self._is_paused, "on", False):
            return
        recomputing = is_recomputing()
        with self._lock:
            if not recomputing:
                for layer in self._bounds.layers_of(module):
                    with self.bearing(layer, "entropy_bound"):
                        self._bounds.take_tokens(module, tokens.detach())
            if module in self._blocks:
                self._observe_block(self._blocks[module], tokens, recomputing, is_replica)

    def _observe_block(
        self, block: FoundBlock, tokens: Tensor, recomputing: bool, is_replica: bool
    ) -> None:
        layer = block.name
        if recomputing:  # of several calls of one layer the backward comes to the last one first
            calls = [name for name, count in self._without_gradient.items() if count]
            layer = next((n for n in reversed(calls) if n.partition("@")[0] == layer), layer)
        else:
            if layer not in self._measured:
                self._measured.add(layer)
                self._measure_weights(block)
            layer = self._calls.next_of(block.module, layer)
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
        bounded = {"sigma_qk"} if self._bounds else set()
        for layer, terms in weight_terms(block, wanted | bounded, self.bearing).items():
            for term, value in terms.items():
                if term in wanted:
                    getattr(self.records, term)[layer] = value.float()
            if bounded and "sigma_qk" in terms:
                with self.bearing(layer, "entropy_bound"):
                    self._bounds.take_weights(block, layer, terms["sigma_qk"])

    @torch.no_grad()
    def _observe_tokens(self, what: str, layer: str, tokens: Tensor, is_replica: bool) -> None:
        norm, nonfinite = f"norm_{what}", f"nonfinite_{what}"
        with self._lock, self.bearing(layer, norm, nonfinite):
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            self._sums.add_norm(norm, layer, tokens, is_replica=is_replica)
            self._sums.add_nonfinite(nonfinite, layer, tokens)

    def finish_replicas(self) -> None:
        """Take what replicas showed so far as one forward: their norms are of parts of a batch."""
        with self._lock:
            self._sums.finish_replicas()

    @torch.no_grad()
    def observe_attention(self, call: AttentionCall, *, is_first: bool = True) -> None:
        """Record entropy, its bound and the shape of the map of one attention call.

        Args:
            call: of the model's own module, also where a replica of it ran.
            is_first: whether it has the first sequence of the batch.
        """
        if self.wants_attention:
            self._observe(
                call.module,
                partial(self._attention.observe_rows, call, self.name_of(call.module)),
                partial(self._attention.observe_map, call),
                is_first,
            )

    @torch.no_grad()
    def observe_maps(self, module: nn.Module, maps: Tensor, *, is_first: bool = True) -> None:
        """Record the same, but for the bound, of the maps that a module itself returns.

        Args:
            module: the model's own, also where a replica of it ran.
            maps: (batch, heads, queries, keys), rows that sum to 1.
            is_first: whether the first sequence of the batch is among them.
        """
        self._observe(
            module,
            partial(self._attention.observe_given_rows, maps),
            partial(self._attention.observe_given_map, maps),
            is_first,
        )

    def _observe(
        self,
        module: nn.Module,
        observe_rows: Callable[[str], None],
        observe_map: Callable[[str], None],
        is_first: bool,
    ) -> None:
        with self._lock:
            layer = self._calls.next_of(module, self.name_of(module))
            with self.bearing(layer, "entropy", "entropy_normalised", "entropy_bound"):
                observe_rows(layer)
            if is_first and layer not in self._mapped:
                self._mapped.add(layer)
                with self.bearing(layer, "rank", "mode"):
                    observe_map(layer)

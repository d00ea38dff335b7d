"""What a probe records of one attention call: entropy and its bound, and the shape of the map."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Literal

import torch
from torch import Tensor

from hf_stable.measures.collapse import collapse_mode, rank_share
from hf_stable.measures.entropy import (
    NEGLIGIBLE_LOGIT,
    attention_entropy,
    attention_entropy_from_qk,
    count_visible_keys,
    entropy_lower_bound,
    normalise_entropy,
    sample_queries,
)
from hf_stable.monitor.attention_call import AttentionCall, first_maps, in_bins
from hf_stable.monitor.logit_bounds import LogitBounds
from hf_stable.monitor.records import MAP_SIZE
from hf_stable.monitor.sums import Sums

__all__ = ["AttentionTerms"]

ROWS_AT_ONCE = 256


class AttentionTerms:
    """Measures attention calls.

    Args:
        terms: that are recorded.
        sums: of what is of many rows; what is of one map goes into its records.
        bounds: on the logits.
        queries: rows of each map to measure, "all" or a number.
        maps: heads whose maps are kept.
        generator: of sampled rows.

    Raises:
        ValueError: for a bad `queries`.
    """

    def __init__(
        self,
        terms: Set[str],
        sums: Sums,
        bounds: LogitBounds,
        *,
        queries: Literal["all"] | int,
        maps: Literal["all"] | Sequence[int],
        generator: torch.Generator | None,
    ) -> None:
        """Check what can be wrong before anything runs."""
        sample_queries(1, queries)
        self._terms = terms
        self._sums = sums
        self._bounds = bounds
        self._queries = queries
        self._maps = maps
        self._generators = _Generators(generator)

    def observe_rows(self, call: AttentionCall, bounded: str, layer: str) -> None:
        """Record the entropy of sampled rows, and its bound.

        Args:
            call: the call.
            bounded: the layer whose weights bound it.
            layer: the name to record it by, one for each call of a shared layer.
        """
        rows = sample_queries(
            call.q.shape[2], self._queries, generator=self._generator(call), device=call.q.device
        )
        # In pieces: a mask of all rows at once would be the matrix that nothing else here keeps.
        for some in rows.split(ROWS_AT_ONCE):
            mask = call.mask_rows(some)
            entropy = attention_entropy_from_qk(
                call.q.index_select(2, some), call.k, mask, call.scale, softcap=call.softcap
            )
            keys = count_visible_keys(call.k.shape[2], torch.arange(len(some)).to(some), mask)
            self._sums.add_rows("entropy", layer, entropy)
            self._sums.add_rows("entropy_normalised", layer, normalise_entropy(entropy, keys))
            if (norm := self._bounds.norm(call, bounded, mask)) is not None:
                bound = entropy_lower_bound(norm, keys.clamp_min(1)).expand_as(entropy)
                bound = bound.masked_fill(entropy.isnan(), math.nan)
                self._sums.add_rows("entropy_bound", layer, bound)

    def observe_given_rows(self, maps: Tensor, layer: str) -> None:
        """Record the entropy of sampled rows of maps (batch, heads, queries, keys)."""
        generator = self._generators.on(maps.device)
        rows = sample_queries(maps.shape[2], self._queries, generator=generator, device=maps.device)
        for some in rows.split(ROWS_AT_ONCE):
            given = maps.index_select(2, some).float()
            entropy = attention_entropy(given)
            # What the model hides gets nothing, or as little as a logit of -100 leaves.
            keys = (given > given.amax(-1, keepdim=True) * math.exp(NEGLIGIBLE_LOGIT)).sum(-1)
            self._sums.add_rows("entropy", layer, entropy)
            self._sums.add_rows("entropy_normalised", layer, normalise_entropy(entropy, keys))

    def observe_map(self, call: AttentionCall, layer: str) -> None:
        """Record rank and mode of the first sequence's map, and the map if it is kept."""
        if self._wants_map:
            self._take_map(first_maps(call, self._generator(call)), layer)

    def observe_given_map(self, maps: Tensor, layer: str) -> None:
        """Record the same of the first of maps (batch, heads, queries, keys)."""
        if self._wants_map:
            length = maps.shape[2]
            generator = self._generators.on(maps.device)
            rows = sample_queries(
                length, min(length, MAP_SIZE), generator=generator, device=maps.device
            )
            self._take_map(in_bins(maps[0].index_select(1, rows).float()), layer)

    @property
    def _wants_map(self) -> bool:
        return bool(self._maps) or not self._terms.isdisjoint(("rank", "mode"))

    def _take_map(self, maps: Tensor, layer: str) -> None:
        records = self._sums.records
        if "rank" in self._terms:
            records.rank[layer] = rank_share(maps)
        if "mode" in self._terms:
            defined = maps.isfinite().all(-1).any(-1).tolist()
            records.mode[layer] = [
                collapse_mode(one)[0] if is_defined else "undefined"
                for one, is_defined in zip(maps, defined, strict=True)
            ]
        if self._maps == "all":
            records.maps[layer] = maps
        elif self._maps:
            # Layers may have more heads than others, as Swin's later ones do.
            records.maps[layer] = maps[[head for head in self._maps if head < len(maps)]]

    def _generator(self, call: AttentionCall) -> torch.Generator | None:
        return self._generators.on(call.q.device)


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

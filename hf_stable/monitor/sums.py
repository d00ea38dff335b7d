"""Means over what runs within a probe: over micro-batches, rows, and replicas of a model."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from hf_stable.monitor.records import Records

__all__ = ["Sums"]


class Sums:
    """Adds up what is measured, and keeps the means in `Records`.

    Args:
        records: to be filled.
        terms: that are recorded; others are left out.
    """

    def __init__(self, records: Records, terms: Set[str]) -> None:
        """Begin with nothing added."""
        self.records = records
        self._terms = terms
        self._totals: dict[tuple[str, str], Tensor] = {}
        self._squares: dict[tuple[str, str], Tensor] = {}

    def add(self, term: str, layer: str, total: Tensor, count: Tensor) -> None:
        """Add a total of so many values to a mean."""
        counts = self.records.counts.setdefault(term, {})
        if layer in counts:
            known = self._totals[term, layer]
            total, count = known + total.to(known), counts[layer] + count.to(counts[layer])
        self._totals[term, layer], counts[layer] = total, count
        getattr(self.records, term)[layer] = (total / count).float()

    def add_rows(self, term: str, layer: str, values: Tensor) -> None:
        """Add values (batch, heads, rows) to a mean per head; NaN marks rows to leave out."""
        if term in self._terms:
            self.add(term, layer, values.nansum((0, 2)), (~values.isnan()).sum((0, 2)))

    def add_norm(self, term: str, layer: str, tokens: Tensor, *, is_replica: bool) -> None:
        """Add the norm of tokens to a mean; that of a replica is of a part of its forward's."""
        if term not in self._terms:
            return None
        norm = torch.linalg.vector_norm(tokens)
        if not is_replica:
            return self.add(term, layer, norm, torch.ones(()))
        square, known = norm.square(), self._squares.get((term, layer))
        self._squares[term, layer] = square if known is None else known + square.to(known)
        return None

    def add_nonfinite(self, term: str, layer: str, tokens: Tensor) -> None:
        """Count entries that are not finite."""
        if term in self._terms:
            counts, count = getattr(self.records, term), (~tokens.isfinite()).sum().float()
            known = counts.get(layer)
            counts[layer] = count if known is None else known + count.to(known)

    def finish_replicas(self) -> None:
        """Take what replicas showed so far as one forward."""
        for (term, layer), squares in self._squares.items():
            self.add(term, layer, squares.sqrt(), torch.ones(()))
        self._squares.clear()

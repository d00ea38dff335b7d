"""Which head collapsed when, and what grew there: what a run's probes show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hf_stable.monitor.thresholds import Thresholds
from hf_stable.report.run_records import Probe, RunRecords
from hf_stable.report.values import to_number

__all__ = ["Collapse", "Growth", "find_collapse", "find_growth", "last_stretch"]

GROWTH_PROBES = 8
"""Probes over which a growth of sigma_1(Wq^T Wk) is looked for."""


class Collapse(NamedTuple):
    """The first head whose attention became sparse and stayed so.

    Attributes:
        step: of the probe that saw it first.
        layer: name of the layer.
        head: its number.
        is_malignant: low rank too; otherwise the map is close to the identity.
        from_start: whether it was sparse at the first probe already: before this run, or before
            anyone looked.
        attempt: number of rollbacks before that probe.
        share: entropy over its largest possible value then.
        rank: of the map, 0 to 1; NaN where it was not recorded.
        num_heads: how many heads are so at the last probe.
        total_heads: of how many.
    """

    step: int
    layer: str
    head: int
    is_malignant: bool
    from_start: bool
    attempt: int
    share: float
    rank: float
    num_heads: int
    total_heads: int

    def is_old_habit(self, limits: Thresholds) -> bool:
        """Return whether it was so from the start in a few heads only, as in pretrained models."""
        return self.from_start and self.num_heads < limits.most_heads * self.total_heads


class Growth(NamedTuple):
    """How sigma_1(Wq^T Wk) of a head grew fastest up to a step."""

    factor: float
    first_step: int
    last_step: int
    before: float
    after: float


def find_collapse(run: RunRecords, limits: Thresholds) -> Collapse | None:
    """Find the first head that becomes sparse and stays so.

    A single probe at which it is not, after two at which it is, ends nothing. Of a run that went
    back only what led to its end counts. Malignant ones go before benign ones, those of this run
    before those that were there at the first probe; few of these go last.
    """
    history = _history(run)
    found = [
        collapse
        for (layer, head), seen in history.items()
        if (collapse := _collapse_of(layer, head, seen, limits)) is not None
    ]
    counted = [
        each._replace(
            num_heads=sum(other.is_malignant == each.is_malignant for other in found),
            total_heads=len(history),
        )
        for each in found
    ]

    def order(each: Collapse) -> tuple[bool, bool, bool, int, str, int]:
        first = each.is_old_habit(limits), not each.is_malignant, each.from_start
        return *first, each.step, each.layer, each.head

    return min(counted, key=order, default=None)


Seen = tuple[Probe, float, float]
"""A probe, and what it saw of a head: entropy over its largest possible value, rank of the map."""


def _history(run: RunRecords) -> dict[tuple[str, int], list[Seen]]:
    """Return what the probes on the way to the end saw of each head, by layer and number."""
    history: dict[tuple[str, int], list[Seen]] = {}
    for probe in run.last_way:
        ranks = probe.quantities.get("rank", {})
        for layer, values in probe.quantities.get("entropy_normalised", {}).items():
            for head, value in enumerate(values if isinstance(values, list) else []):
                share = to_number(value)
                if math.isfinite(share):
                    entry = probe, share, _entry(ranks.get(layer), head)
                    history.setdefault((layer, head), []).append(entry)
    return history


def _collapse_of(
    layer: str, head: int, seen: Sequence[Seen], limits: Thresholds
) -> Collapse | None:
    """Return the collapse that a head ended in, if it did; how many others did is not counted."""
    sparse = [share < limits.entropy_share for _, share, _ in seen]
    start = last_stretch(_without_slips(sparse))
    if start is None:
        return None
    probe, share, rank = seen[start]
    pairs = zip(seen[start:], sparse[start:], strict=True)
    later = [rank for (_, _, rank), is_sparse in pairs if is_sparse and math.isfinite(rank)]
    malignant = bool(later) and later[-1] < limits.rank_share
    return Collapse(
        probe.step, layer, head, malignant, start == 0, probe.attempt, share, rank, 0, 0
    )


def find_growth(run: RunRecords, collapse: Collapse) -> Growth | None:
    """Find the fastest growth of a head's sigma_1(Wq^T Wk) within a few probes, up to a collapse.

    Probes of one attempt are compared: a rollback takes the weights back.
    """
    values = [
        (
            probe.step,
            _entry(probe.quantities.get("sigma_qk", {}).get(collapse.layer), collapse.head),
        )
        for probe in run.probes
        if probe.attempt == collapse.attempt and probe.step <= collapse.step
    ]
    known = [(step, value) for step, value in values if math.isfinite(value) and value > 0]
    pairs = [
        Growth(after / before, first, last, before, after)
        for i, (first, before) in enumerate(known)
        for last, after in known[i + 1 : i + 1 + GROWTH_PROBES]
        if last > first
    ]
    return max(pairs, default=None)


def _without_slips(flags: Sequence[bool]) -> list[bool]:
    """Return the flags with each single false one that follows two true ones made true."""
    filled = list(flags)
    for i in range(2, len(flags)):
        goes_on = i + 1 == len(flags) or flags[i + 1]
        if not flags[i] and flags[i - 1] and flags[i - 2] and goes_on:
            filled[i] = True
    return filled


def last_stretch(flags: Sequence[bool]) -> int | None:
    """Return where the run of true flags at the end begins, or None if the last is false."""
    if not flags or not flags[-1]:
        return None
    start = len(flags)
    while start and flags[start - 1]:
        start -= 1
    return start


def _entry(values: object, head: int) -> float:
    if not isinstance(values, list) or head >= len(values):
        return math.nan
    return to_number(values[head])

"""What a run's records show: which head collapsed when, what grew there, where the loss went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal, NamedTuple

from hf_stable.measures.loss_curves import SMOOTHING, lost_step, smooth
from hf_stable.monitor.alarms import Thresholds
from hf_stable.report.run_records import Probe, RunRecords
from hf_stable.report.values import to_number

__all__ = [
    "Collapse",
    "Growth",
    "LossTrouble",
    "find_collapse",
    "find_growth",
    "find_trouble",
    "hardly_moved",
]

GROWTH_PROBES = 8
"""Probes over which a growth of sigma_1(Wq^T Wk) is looked for."""

GIVEN_BACK = 0.2
"""A loss that ends above its best is lost only if it gave back this share of what it had gained:
a loss near zero is never within 10 % of its best for long."""


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


class LossTrouble(NamedTuple):
    """How the loss left its course, and where: a loss that "stalled" was never on any."""

    kind: Literal["nonfinite", "lost", "stalled"]
    step: int | None


def find_collapse(run: RunRecords, limits: Thresholds) -> Collapse | None:
    """Find the first head that becomes sparse and stays so.

    A single probe at which it is not, after two at which it is, ends nothing. Of a run that went
    back only what led to its end counts. Malignant ones go before benign ones, those of this run
    before those that were there at the first probe; few of these go last.
    """
    history: dict[tuple[str, int], list[tuple[Probe, float, float]]] = {}
    for probe in run.last_way:
        shares = probe.quantities.get("entropy_normalised", {})
        ranks = probe.quantities.get("rank", {})
        for layer, values in shares.items():
            for head, value in enumerate(values if isinstance(values, list) else []):
                share = to_number(value)
                if math.isfinite(share):
                    entry = probe, share, _entry(ranks.get(layer), head)
                    history.setdefault((layer, head), []).append(entry)
    found = []
    for (layer, head), seen in history.items():
        sparse = [share < limits.entropy_share for _, share, _ in seen]
        start = _last_stretch(_without_slips(sparse))
        if start is None:
            continue
        probe, share, rank = seen[start]
        pairs = zip(seen[start:], sparse[start:], strict=True)
        later = [rank for (_, _, rank), is_sparse in pairs if is_sparse and math.isfinite(rank)]
        malignant = bool(later) and later[-1] < limits.rank_share
        place = probe.step, layer, head
        found.append(Collapse(*place, malignant, start == 0, probe.attempt, share, rank, 0, 0))
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


def find_trouble(
    run: RunRecords, collapse: Collapse | None, limits: Thresholds
) -> LossTrouble | None:
    """Say where the loss left its course.

    It is "nonfinite" if the run ends with a NaN or infinite loss; "lost" where it never again comes
    near its best (`lost_step`) and has given back a good part of what it had gained; "stalled"
    where a malignant collapse goes with a loss that has hardly come down. Without a collapse, or
    with one of a few heads that was there before, a loss that hardly moves is no trouble: it may
    have been low from the start.
    """
    losses = run.losses
    values = [value for _, value in losses]
    bad = _last_stretch([not math.isfinite(value) for value in values])
    if bad is not None:
        return LossTrouble("nonfinite", losses[bad][0])
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    first = _first_level(finite)
    lost, levels = lost_step(values), smooth(values)
    best = min(levels)
    if lost is not None and levels[-1] - best > GIVEN_BACK * (first - best):
        return LossTrouble("lost", losses[lost - 1][0])
    suspect = collapse if collapse is None or not collapse.is_old_habit(limits) else None
    if suspect is not None and suspect.is_malignant and hardly_moved(values, limits):
        return LossTrouble("stalled", None)
    return None


def hardly_moved(losses: Sequence[float], limits: Thresholds) -> bool:
    """Return whether no finite loss of a run is below a good part of where it began."""
    finite = [value for value in losses if math.isfinite(value)]
    return bool(finite) and min(finite) > limits.learnt * _first_level(finite)


def _first_level(finite: Sequence[float]) -> float:
    return median(finite[: max(1, min(SMOOTHING, len(finite) // 4))])


def _without_slips(flags: Sequence[bool]) -> list[bool]:
    """Return the flags with each single false one that follows two true ones made true."""
    filled = list(flags)
    for i in range(2, len(flags)):
        goes_on = i + 1 == len(flags) or flags[i + 1]
        if not flags[i] and flags[i - 1] and flags[i - 2] and goes_on:
            filled[i] = True
    return filled


def _last_stretch(flags: Sequence[bool]) -> int | None:
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

"""Which attention maps a report shows: as many steps, layers and heads as a page can carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_stable.report.records import AttentionMap, Probe, RunRecords, short_names, to_number

__all__ = ["MapFrame", "MapSeries", "choose_maps"]

PAGE_BUDGET = 280_000
"""Entries of all maps of a report together: one byte each, a third more on the page."""

MIN_STEPS, MAX_STEPS = 6, 24


@dataclass(frozen=True)
class MapFrame:
    """A map at a step, its mode and the entropy of its head; None for a map that is not finite."""

    step: int
    attempt: int
    mode: str
    share: float
    content: AttentionMap | None


@dataclass(frozen=True)
class MapSeries:
    """The maps of one head over the steps.

    Attributes:
        label: such as "layer 3, head 1"; the same head of another run has the same.
        frames: in the order of the steps.
    """

    label: str
    frames: tuple[MapFrame, ...]


def choose_maps(runs: Sequence[RunRecords]) -> list[list[MapSeries]]:
    """Return for each run the heads to show, in the order of the model, and their maps.

    Where not all fit, heads whose entropy fell lowest go first, and steps are taken evenly, the
    first, the last and those of alarms among them. All runs show the same heads.
    """
    watched = [[probe for probe in run.probes if probe.maps] for run in runs]
    order = _heads_by_need(runs, watched)
    side = max(
        (
            m.size
            for probes in watched
            for p in probes
            for maps in p.maps.values()
            for m in maps
            if m
        ),
        default=1,
    )
    budget = PAGE_BUDGET // side**2 // max(1, sum(map(bool, watched)))
    heads = set(order[: max(1, budget // MIN_STEPS)])
    num_steps = min(MAX_STEPS, max(MIN_STEPS, budget // max(1, len(heads))))
    return [
        _series(run, _choose_steps(run, probes, num_steps), heads)
        for run, probes in zip(runs, watched, strict=True)
    ]


def head_numbers(run: RunRecords, count: int) -> list[int]:
    """Return the numbers of the heads whose maps were kept."""
    chosen = run.monitor.get("maps")
    if (
        isinstance(chosen, list)
        and len(chosen) == count
        and all(isinstance(i, int) for i in chosen)
    ):
        return chosen
    return list(range(count))


def _heads_by_need(
    runs: Sequence[RunRecords], watched: Sequence[Sequence[Probe]]
) -> list[tuple[str, int]]:
    """Return (short name of layer, head), lowest entropy first."""
    lowest: dict[tuple[str, int], float] = {}
    for run, probes in zip(runs, watched, strict=True):
        names = short_names(run.layers)
        for probe in probes:
            for layer, maps in probe.maps.items():
                for head in head_numbers(run, len(maps)):
                    key = names.get(layer, layer), head
                    share = _share(probe, layer, head)
                    share = share if math.isfinite(share) else 1.0
                    lowest[key] = min(lowest.get(key, math.inf), share)
    return sorted(lowest, key=lambda key: lowest[key])


def _choose_steps(run: RunRecords, probes: Sequence[Probe], count: int) -> list[Probe]:
    if len(probes) <= count:
        return list(probes)
    alarms = [event.step for event in run.events if event.name == "alarm"]
    wanted = {0, len(probes) - 1}
    for step in alarms[: count // 4]:
        wanted.add(min(range(len(probes)), key=lambda i: abs(probes[i].step - step)))
    for number in range(count):
        if len(wanted) < count:
            wanted.add(round(number * (len(probes) - 1) / (count - 1)))
    return [probes[i] for i in sorted(wanted)]


def _series(
    run: RunRecords, probes: Sequence[Probe], heads: set[tuple[str, int]]
) -> list[MapSeries]:
    frames: dict[tuple[str, int], list[MapFrame]] = {}
    names = short_names(run.layers)
    for probe in probes:
        for layer, maps in probe.maps.items():
            modes = probe.quantities.get("mode", {}).get(layer)
            for head, content in zip(head_numbers(run, len(maps)), maps, strict=True):
                key = names.get(layer, layer), head
                if key in heads:
                    mode = "mode not recorded"
                    if isinstance(modes, list) and head < len(modes):
                        mode = str(modes[head])
                    share = _share(probe, layer, head)
                    frame = MapFrame(probe.step, probe.attempt, mode, share, content)
                    frames.setdefault(key, []).append(frame)
    order = [names[layer] for layer in run.layers]
    in_order = sorted(frames, key=lambda key: (order.index(key[0]) if key[0] in order else 0, key))
    return [
        MapSeries(f"layer {layer}, head {head}", tuple(frames[layer, head]))
        for layer, head in in_order
    ]


def _share(probe: Probe, layer: str, head: int) -> float:
    shares = probe.quantities.get("entropy_normalised", {}).get(layer)
    return to_number(shares[head]) if isinstance(shares, list) and head < len(shares) else math.nan

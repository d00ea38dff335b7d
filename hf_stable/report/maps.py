"""Which attention maps a report shows: as many steps, layers and heads as a page can carry."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hf_stable.report.charts import choose_steps
from hf_stable.report.map_lines import parse_map, read_maps
from hf_stable.report.run_records import AttentionMap, Probe, RunRecords
from hf_stable.report.values import to_number, to_step

__all__ = ["MapFrame", "MapSeries", "choose_maps"]

MOST_BYTES = 400_000
"""What all maps of a report may take on its page."""

FRAME_BYTES = 110
"""What a map takes on a page besides its entries, each of which is a byte, in base64."""

MIN_STEPS, MAX_STEPS = 6, 24


@dataclass(frozen=True)
class MapFrame:
    """A map at a step, its mode and the entropy of its head; None for a damaged map."""

    step: int
    attempt: int
    mode: str
    share: float
    content: AttentionMap | None

    @property
    def when(self) -> str:
        """Return its step, which other attempts may have too, and its attempt."""
        return f"step {self.step}" + (f", after rollback {self.attempt}" if self.attempt else "")


@dataclass(frozen=True)
class MapSeries:
    """The maps of one head over the steps.

    Attributes:
        label: such as "layer 3, head 1"; the same head of another run has the same.
        frames: in the order of the attempts, and of the steps of each.
    """

    label: str
    frames: tuple[MapFrame, ...]


def choose_maps(runs: Sequence[RunRecords], num_bytes: int = MOST_BYTES) -> list[list[MapSeries]]:
    """Return for each run the heads to show, in the order of the model, and their maps.

    Where not all fit, heads whose entropy fell lowest go first, and steps are taken evenly, the
    first, the last and those of alarms among them. All runs show the same heads. Of the steps that
    are not shown no map is parsed.

    Args:
        runs: as read from disk.
        num_bytes: room on the page; at least one head at `MIN_STEPS` steps is shown, and no more
            than fit in `MOST_BYTES`.
    """
    watched = [[probe for probe in run.probes if probe.maps_at is not None] for run in runs]
    recorded, side = [], 1
    for run, probes in zip(runs, watched, strict=True):
        # The first and the last are shown in any case, and tell of which heads there are maps.
        samples = [_read(run, probe) for probe in (probes[0], probes[-1])] if probes else []
        recorded.append(list(dict.fromkeys(head for maps in samples for head in maps)))
        sizes = [len(m) for maps in samples for m in maps.values() if isinstance(m, list)]
        side = max([side, *sizes])
    order = _by_need(runs, watched, recorded)
    per_map = 4 * math.ceil(side**2 / 3) + FRAME_BYTES
    budget = min(num_bytes, MOST_BYTES) // per_map // max(1, sum(map(bool, watched)))
    shown = set(order[: max(1, budget // MIN_STEPS)])
    num_steps = min(MAX_STEPS, max(MIN_STEPS, budget // max(1, len(shown))))
    return [
        _series(run, _choose_probes(run, probes, num_steps), heads, shown)
        for run, probes, heads in zip(runs, watched, recorded, strict=True)
    ]


def _read(run: RunRecords, probe: Probe) -> dict[tuple[str, int], Any]:
    """Return the rows of each map of a probe by layer and head."""
    assert probe.maps_at is not None
    return {
        (layer, head): rows
        for layer, maps in read_maps(run.log, probe.maps_at).items()
        for head, rows in zip(head_numbers(run, len(maps)), maps, strict=True)
    }


def head_numbers(run: RunRecords, count: int) -> list[int]:
    """Return the numbers of the heads whose maps were kept."""
    chosen = run.monitor.get("maps")
    if isinstance(chosen, list) and len(chosen) == count:
        numbers = [to_step(head) for head in chosen]
        if None not in numbers:
            return [head for head in numbers if head is not None]
    return list(range(count))


def _label(run: RunRecords, layer: str, head: int) -> str:
    return f"layer {run.short_names.get(layer, layer)}, head {head}"


def _by_need(
    runs: Sequence[RunRecords],
    watched: Sequence[Sequence[Probe]],
    recorded: Sequence[Sequence[tuple[str, int]]],
) -> list[str]:
    """Return the labels of all heads that have maps, lowest entropy first."""
    lowest: dict[str, float] = {}
    for run, probes, heads in zip(runs, watched, recorded, strict=True):
        for layer, head in heads:
            shares = (_share(probe, layer, head) for probe in probes)
            least = min(filter(math.isfinite, shares), default=1.0)
            label = _label(run, layer, head)
            lowest[label] = min(lowest.get(label, math.inf), least)
    return sorted(lowest, key=lambda label: lowest[label])


def _choose_probes(run: RunRecords, probes: Sequence[Probe], count: int) -> list[Probe]:
    # One attempt after the other, so that an alarm is not next to a map of another attempt.
    length = 1 + max((each.step for kind in (probes, run.events) for each in kind), default=0)
    steps = [probe.attempt * length + probe.step for probe in probes]
    alarms = [each.attempt * length + each.step for each in run.events if each.name == "alarm"]
    return [probes[i] for i in choose_steps(steps, alarms, count)]


def _series(
    run: RunRecords,
    probes: Sequence[Probe],
    recorded: Sequence[tuple[str, int]],
    shown: Collection[str],
) -> list[MapSeries]:
    order = {layer: position for position, layer in enumerate(run.layers)}
    labels = {
        (layer, head): label
        for layer, head in sorted(recorded, key=lambda key: (order.get(key[0], 0), key))
        if (label := _label(run, layer, head)) in shown
    }
    frames: dict[str, list[MapFrame]] = {label: [] for label in labels.values()}
    for probe in probes:
        maps = _read(run, probe)
        for (layer, head), label in labels.items():
            modes = probe.quantities.get("mode", {}).get(layer)
            mode = "mode not recorded"
            if isinstance(modes, list) and head < len(modes):
                mode = str(modes[head])
            content = parse_map(maps.get((layer, head)))
            share = _share(probe, layer, head)
            frames[label].append(MapFrame(probe.step, probe.attempt, mode, share, content))
    return [MapSeries(label, tuple(each)) for label, each in frames.items()]


def _share(probe: Probe, layer: str, head: int) -> float:
    shares = probe.quantities.get("entropy_normalised", {}).get(layer)
    return to_number(shares[head]) if isinstance(shares, list) and head < len(shares) else math.nan

"""A run at a glance, as numbers and short texts: for those who have a terminal and no browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hf_stable.report.events import Event
from hf_stable.report.run_records import Probe, RunRecords
from hf_stable.report.values import to_number
from hf_stable.report.verdict import Verdict, judge

__all__ = ["Glance", "HeadAtProbe", "glance_at", "sparkline"]

MOST_HEADS, MOST_ALARMS = 6, 4

BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


class HeadAtProbe(NamedTuple):
    """A head at the last probe.

    Attributes:
        place: of it, such as "layer 3, head 1".
        share: entropy over its largest possible value.
        sigma_qk: sigma_1(Wq^T Wk), NaN where it was not recorded.
        mode: of its map, "" where it was not recorded.
    """

    place: str
    share: float
    sigma_qk: float
    mode: str


@dataclass(frozen=True)
class Glance:
    """What can be seen of a run now.

    Attributes:
        name: of the run.
        verdict: the judgement so far.
        num_steps: optimizer steps done.
        max_steps: planned, or None.
        losses: (step, loss), NaN where it was not finite.
        probe_step: step of the last probe, or None.
        heads: those of the lowest entropy there, the lowest first.
        alarms: the last ones.
        num_alarms: how many there were.
        notes: what is damaged or missing, in sentences.
    """

    name: str
    verdict: Verdict
    num_steps: int
    max_steps: int | None
    losses: tuple[tuple[int, float], ...]
    probe_step: int | None
    heads: tuple[HeadAtProbe, ...]
    alarms: tuple[Event, ...]
    num_alarms: int
    notes: tuple[str, ...]


def glance_at(run: RunRecords) -> Glance:
    """Return what can be seen of a run now."""
    watched = [p for p in run.last_way if p.quantities.get("entropy_normalised")]
    alarms = [event for event in run.events if event.name == "alarm"]
    return Glance(
        name=run.name,
        verdict=judge(run),
        num_steps=run.num_steps,
        max_steps=run.max_steps,
        losses=tuple(run.losses),
        probe_step=watched[-1].step if watched else None,
        heads=tuple(_worst_heads(run, watched[-1])) if watched else (),
        alarms=tuple(alarms[-MOST_ALARMS:]),
        num_alarms=len(alarms),
        notes=tuple(run.notes),
    )


def _worst_heads(run: RunRecords, probe: Probe) -> list[HeadAtProbe]:
    found = []
    for layer, shares in probe.quantities["entropy_normalised"].items():
        for head, value in enumerate(shares if isinstance(shares, list) else []):
            if math.isfinite(share := to_number(value)):
                place = f"layer {run.short_names.get(layer, layer)}, head {head}"
                sigma = to_number(_entry(probe, "sigma_qk", layer, head))
                mode = _entry(probe, "mode", layer, head)
                found.append(
                    HeadAtProbe(place, share, sigma, mode if isinstance(mode, str) else "")
                )
    return sorted(found, key=lambda head: head.share)[:MOST_HEADS]


def _entry(probe: Probe, quantity: str, layer: str, head: int) -> object:
    values = probe.quantities.get(quantity, {}).get(layer)
    return values[head] if isinstance(values, list) and head < len(values) else None


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a curve of so many characters at most: the mean of each stretch as a bar.

    A stretch without a finite value is an x.
    """
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    means = []
    for number in range(count):
        start, stop = (len(values) * i // count for i in (number, number + 1))
        finite = [value for value in values[start:stop] if math.isfinite(value)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        return "x" * count
    low, high = min(known), max(known)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        BARS[round((mean - low) * scale)] if math.isfinite(mean) else "x" for mean in means
    )

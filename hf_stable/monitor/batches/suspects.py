"""Which steps an alarm makes suspicious, by their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_stable.measures.loss_curves import SMOOTHING
from hf_stable.monitor.alarms import Alarm

__all__ = ["KINDS", "STEPS", "RecentLosses", "suspicious_steps"]

KINDS = ("spike", "nonfinite")
"""Alarms that a batch can be to blame for."""

STEPS = SMOOTHING + 1
"""Steps that can be suspicious: those that the smoothed loss looks at, and the one before."""


class RecentLosses:
    """Losses of the last steps that trained, with their numbers."""

    def __init__(self) -> None:
        """Begin with none."""
        self._entries: list[tuple[int, float]] = []

    def add(self, step: int, loss: float, gradients_finite: bool) -> None:
        """Add a step; one whose gradients are not finite counts as NaN."""
        entry = step, loss if gradients_finite else math.nan
        self._entries = [*self._entries[1 - STEPS :], entry]

    @property
    def last(self) -> float | None:
        """The last finite loss, or None."""
        return next((loss for _, loss in reversed(self._entries) if math.isfinite(loss)), None)

    def of_steps(self) -> list[tuple[int, float]]:
        """Return (step, loss), in order."""
        return list(self._entries)

    def state(self) -> list[list[float | int]]:
        """Return what a resumed run needs, for JSON, which has null for NaN."""
        return [[step, loss] for step, loss in self._entries]

    def load_state(self, state: Sequence[Sequence[Any]]) -> None:
        """Continue from a `state()`."""
        self._entries = [(step, math.nan if loss is None else loss) for step, loss in state]


def suspicious_steps(alarms: Sequence[Alarm], recent: Mapping[int, float]) -> list[int]:
    """Return the steps whose batches may be to blame for a spike or a loss that is not finite.

    Of a spike these are the steps among the last ones whose loss is above the alarm's threshold,
    of "nonfinite" the last ones that are not finite, what lies between them, and always the step
    before the first: its update was the last one before the loss that is too high.

    Args:
        alarms: that begin with a step; of other kinds none are suspicious.
        recent: step -> loss, with that step.
    """
    found: set[int] = set()
    for alarm in alarms:
        if alarm.kind not in KINDS:
            continue
        bad = [step for step, loss in recent.items() if not loss <= alarm.threshold]
        if alarm.kind == "nonfinite":
            bad = [step for step, loss in recent.items() if not math.isfinite(loss)]
        first = min([*bad[-SMOOTHING:], alarm.step])
        found.update(range(max(1, first - 1), alarm.step + 1))
    return sorted(found)

"""How far a watched run is: what its rules have seen, how often it alarmed and went back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_stable.monitor.alarms import Alarm, AlarmRules
from hf_stable.monitor.batches.suspects import RecentLosses
from hf_stable.monitor.rollbacks import Rollbacks
from hf_stable.monitor.signs import Values
from hf_stable.monitor.thresholds import Thresholds

__all__ = ["Progress"]

SCALER_PATIENCE = 10
"""Steps in a row with infinite gradients that a GradScaler looking for its scale may take."""


class Progress:
    """What a run has come to; a checkpoint keeps it, so that a resumed run goes on alike.

    Args:
        rollbacks: the ways back, which outlive a run's beginning.

    Attributes:
        rules: of alarms.
        rollbacks: the ways back.
        nonfinite_steps: steps so far with a NaN or infinite loss or gradient.
        num_alarms: so far.
        recent: losses of the last steps.
    """

    def __init__(self, rollbacks: Rollbacks, thresholds: Thresholds | None) -> None:
        """Start with nothing seen."""
        self.rollbacks = rollbacks
        self.begin(thresholds)

    def begin(self, thresholds: Thresholds | None) -> None:
        """Forget everything about a run."""
        self.rules = AlarmRules(thresholds)
        self.rollbacks.begin()
        self.nonfinite_steps = 0
        self.num_alarms = 0
        self.recent = RecentLosses()
        self._nonfinite_streak = 0
        self._last_probe = 0

    def is_due(self, step: int, every: int) -> bool:
        """Say whether a step is to be probed, and count it as such if so."""
        is_early = step < every and step & (step - 1) == 0  # 1, 2, 4, ...
        waited = step - self._last_probe >= max(1, every // 10)
        due = is_early or step % every == 0 or (self.rules.is_rising and waited)
        if due:
            self._last_probe = step
        return due

    def judge_loss(self, step: int, loss: float, finite: bool, *, has_scaler: bool) -> list[Alarm]:
        """Take a step's loss; return the alarms that begin with it.

        Args:
            step: optimizer step.
            loss: of it.
            finite: whether its gradients are.
            has_scaler: whether a GradScaler looks for its scale by infinite gradients.
        """
        self._nonfinite_streak = 0 if finite else self._nonfinite_streak + 1
        self.nonfinite_steps += not (finite and math.isfinite(loss))
        self.recent.add(step, loss, finite)
        bearable = has_scaler and self._nonfinite_streak <= SCALER_PATIENCE
        return self._count(self.rules.observe_loss(step, loss, finite or bearable))

    def judge_probe(self, step: int, quantities: Mapping[str, Values]) -> list[Alarm]:
        """Take what a probe recorded; return the alarms that begin with it."""
        return self._count(self.rules.observe_probe(step, quantities))

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, for JSON."""
        return {
            "rules": self.rules.state(),
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_streak": self._nonfinite_streak,
            "num_alarms": self.num_alarms,
            "rollbacks": self.rollbacks.state(),
            "recent": self.recent.state(),
            "last_probe": self._last_probe,
        }

    def load_saved(self, saved: Mapping[str, Any], step: int) -> None:
        """Continue from the monitor's entry in `trainer_state.json` of the checkpoint of a step.

        Raises:
            ValueError: if it is damaged, or of a version that keeps something else there.
        """
        try:
            self.load_state(saved["attributes"]["progress"], step)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                "the state of StabilityCallback in the checkpoint's trainer_state.json cannot be "
                f"read ({error!r}): it is damaged, or of another version of hf_stable. Resume "
                "from another checkpoint, or take StabilityCallback out of its "
                "stateful_callbacks: alarms and rollbacks are then counted anew"
            ) from error

    def load_state(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from a `state()` that the checkpoint of a step holds."""
        self.rules.load_state(state["rules"])
        self.nonfinite_steps = state["nonfinite_steps"]
        self._nonfinite_streak = state["nonfinite_streak"]
        self.num_alarms = state["num_alarms"]
        self.rollbacks.load_state(state["rollbacks"])
        self.recent.load_state(state.get("recent", ()))
        self._last_probe = state["last_probe"]
        if not self.rules.is_suspicious:
            self.rollbacks.note(step)  # it was written after its own state

    def _count(self, alarms: list[Alarm]) -> list[Alarm]:
        self.num_alarms += len(alarms)
        return alarms

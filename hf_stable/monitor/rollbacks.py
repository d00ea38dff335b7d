"""Which checkpoint to go back to when a run collapses, how often, and at what rate."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import TrainingArguments

__all__ = ["Healthy", "Rollbacks", "check_can_roll_back"]


class Healthy(NamedTuple):
    """A checkpoint that can be gone back to, and by what its rates are scaled already."""

    step: int
    lr_scale: float


class Rollbacks:
    """The checkpoints written while nothing was wrong, and the ways back that were taken.

    Args:
        most: how many rollbacks a run may take.
        factor: what each of them multiplies the learning rates by.

    Attributes:
        count: rollbacks taken so far.
        lr_scale: what the rates of this run are multiplied by.
        planned: the checkpoint to resume from, once training has stopped for it.
    """

    def __init__(self, most: int, factor: float) -> None:
        """Start with no checkpoint."""
        self.most = most
        self.factor = factor
        self.planned: Healthy | None = None
        self.begin()

    def begin(self) -> None:
        """Forget everything about a run but where it is to be resumed from."""
        self.count = 0
        self.lr_scale = 1.0
        self._healthy: list[Healthy] = []

    @property
    def next_scale(self) -> float:
        """The rates' scale after one more rollback."""
        return self.factor ** (self.count + 1)

    def note(self, step: int) -> None:
        """Remember a checkpoint that was written, or resumed from, while nothing was wrong."""
        self._healthy = [entry for entry in self._healthy if entry.step < step]
        self._healthy.append(Healthy(step, self.lr_scale))

    def plan(self, folder: str) -> str | None:
        """Choose the last healthy checkpoint on disk as `planned`; return why there is none."""
        kept = [entry for entry in self._healthy if os.path.isdir(checkpoint(folder, entry.step))]
        if not kept:
            return "there is no healthy checkpoint on disk (raise save_total_limit)"
        if self.count >= self.most:
            return f"{self.count} rollbacks did not help"
        self.planned = kept[-1]
        return None

    def take(self, count: int) -> float:
        """Count one more rollback after `count`; return the factor for the rates as they are."""
        self.planned = None
        self.count = count
        wanted = self.next_scale
        self.count += 1
        factor, self.lr_scale = wanted / self.lr_scale, wanted
        return factor

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, for JSON."""
        return {
            "count": self.count,
            "lr_scale": self.lr_scale,
            "healthy": [list(entry) for entry in self._healthy],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`."""
        self.count, self.lr_scale = state["count"], state["lr_scale"]
        self._healthy = [Healthy(*entry) for entry in state["healthy"]]


def checkpoint(folder: str, step: int) -> str:
    """Return the path of the Trainer's checkpoint of a step."""
    return os.path.join(folder, f"checkpoint-{step}")


def check_can_roll_back(args: TrainingArguments) -> None:
    """Raise ValueError unless the Trainer will write checkpoints that training can resume from."""
    if args.save_strategy == "no" or args.save_only_model:
        raise ValueError(
            'on_collapse="rollback" goes back to a checkpoint: set save_strategy to "steps" or '
            '"epoch", and save_only_model=False'
        )
    if args.save_total_limit == 1 and args.load_best_model_at_end:
        raise ValueError(
            'on_collapse="rollback" goes back to the last healthy checkpoint, and with '
            "save_total_limit=1 and load_best_model_at_end the Trainer deletes all but the best "
            "one when training stops: set save_total_limit to 2 or more"
        )

"""Which checkpoint to go back to when a run collapses, how often, and at what rate."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments

__all__ = ["Due", "Healthy", "Rollbacks", "check_can_roll_back", "check_can_skip", "checkpoint"]


class Healthy(NamedTuple):
    """A checkpoint that can be gone back to, and by what its rates are scaled already."""

    step: int
    lr_scale: float


class Due(NamedTuple):
    """What a run that resumes from a checkpoint has to become.

    Attributes:
        rollbacks: that it has taken.
        lr_scale: what its rates are multiplied by.
        skips: steps whose batches it skips.
    """

    rollbacks: int
    lr_scale: float
    skips: tuple[int, ...] = ()


class Rollbacks:
    """The checkpoints written while nothing was wrong, and the ways back that were taken.

    Args:
        most: how many rollbacks a run may take.
        factor: what each of them multiplies the learning rates by.

    Attributes:
        count: rollbacks taken so far.
        lr_scale: what the rates of this run are multiplied by.
        skips: steps whose batches this run skips.
        planned: the checkpoint to resume from, once training has stopped for it.
        planned_skips: what `skips` becomes then.
        due: what is to be done when training resumes, until it has been.
    """

    def __init__(self, most: int, factor: float) -> None:
        """Start with no checkpoint."""
        self.most = most
        self.factor = factor
        self.planned: Healthy | None = None
        self.planned_skips: tuple[int, ...] = ()
        self.due: Due | None = None
        self.begin()

    def begin(self) -> None:
        """Forget everything about a run but what is due when it resumes."""
        self.count = 0
        self.lr_scale = 1.0
        self.skips: tuple[int, ...] = ()
        self._healthy: list[Healthy] = []

    @property
    def next(self) -> Due:
        """What one more rollback makes of a run."""
        return Due(self.count + 1, self.factor ** (self.count + 1), self.planned_skips)

    def note(self, step: int) -> None:
        """Remember a checkpoint that was written, or resumed from, while nothing was wrong."""
        self._healthy = [entry for entry in self._healthy if entry.step < step]
        self._healthy.append(Healthy(step, self.lr_scale))

    def plan(self, folder: str, suspicious: Collection[int] = ()) -> str | None:
        """Choose the last healthy checkpoint on disk as `planned`; return why there is none.

        Args:
            folder: with the checkpoints.
            suspicious: steps to be skipped, before which a checkpoint is chosen if there is one:
                of one that comes later, they have shaped the weights already.
        """
        kept = [entry for entry in self._healthy if os.path.isdir(checkpoint(folder, entry.step))]
        if not kept:
            return "there is no healthy checkpoint on disk (raise save_total_limit)"
        if self.count >= self.most:
            times = "1 rollback" if self.count == 1 else f"{self.count} rollbacks"
            return f"{times} did not help"
        before = min(suspicious, default=kept[-1].step + 1)
        self.planned = ([entry for entry in kept if entry.step < before] or kept)[-1]
        more = (step for step in suspicious if step > self.planned.step)
        self.planned_skips = tuple(sorted({*self.skips, *more}))
        return None

    def take(self) -> float | None:
        """Take what is due; return the factor for the rates as they are, None if nothing is."""
        if self.due is None:
            return None
        factor = self.due.lr_scale / self.lr_scale
        (self.count, self.lr_scale, self.skips), self.due = self.due, None
        return factor

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, for JSON."""
        return {
            "count": self.count,
            "lr_scale": self.lr_scale,
            "skips": list(self.skips),
            "healthy": [list(entry) for entry in self._healthy],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`, to which `due` may have been added."""
        self.count, self.lr_scale = state["count"], state["lr_scale"]
        self.skips = tuple(state.get("skips", ()))
        self._healthy = [Healthy(*entry) for entry in state["healthy"]]
        if self.due is None and state.get("due"):
            rollbacks, lr_scale, *skips = state["due"]
            self.due = Due(rollbacks, lr_scale, *map(tuple, skips))


def checkpoint(folder: str, step: int) -> str:
    """Return the path of the Trainer's checkpoint of a step."""
    return os.path.join(folder, f"checkpoint-{step}")


def check_can_roll_back(args: TrainingArguments, model: nn.Module) -> None:
    """Raise ValueError unless the Trainer will write checkpoints that training can resume from."""
    if args.fsdp or any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            'on_collapse="rollback" resumes in the process that has trained, and there the Trainer '
            'cannot load a checkpoint into a model that FSDP has wrapped: take "stop", and resume '
            "in a new process at a lower rate"
        )
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


def check_can_skip(args: TrainingArguments) -> None:
    """Raise ValueError where steps cannot be left out, or do not tell batches apart."""
    if args.ignore_data_skip:
        raise ValueError(
            "skip_batches=True knows batches by their steps, and ignore_data_skip=True gives other "
            "batches to the steps after a resume: leave one of them out"
        )
    if args.deepspeed or args.fp16:
        who = "DeepSpeed, which steps within its backward," if args.deepspeed else "fp16's scaler"
        raise ValueError(
            f"skip_batches=True leaves whole steps out, which {who} cannot: leave skip_batches "
            "out" + ("" if args.deepspeed else ", or train in bf16")
        )

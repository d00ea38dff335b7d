"""What is done at an alarm: nothing, a stop, a checkpoint, a way back to a healthy one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerControl

from hf_stable._ranks import value_of_first_rank, values_of_all_ranks
from hf_stable.monitor.abandoned import abandon_checkpoints, write_due
from hf_stable.monitor.alarms import Alarm
from hf_stable.monitor.journal import Journal
from hf_stable.monitor.missing import reason_of
from hf_stable.monitor.readings import scale_rates
from hf_stable.monitor.rollbacks import Rollbacks, checkpoint

__all__ = ["Acting"]


class Acting:
    """Does what `on_collapse` says.

    Args:
        on_collapse: as StabilityCallback's.
        rollbacks: the ways back.
        journal: in which it is written down.
        skip_batches: whether a run that goes back skips the batches of suspicious steps.

    Attributes:
        folder: in which the Trainer keeps its checkpoints.
        saves: whether this process writes them.
        stopped: why the training was stopped for good, or None.
    """

    def __init__(
        self,
        on_collapse: str | Callable[[Alarm, TrainerControl], Any],
        rollbacks: Rollbacks,
        journal: Journal,
        *,
        skip_batches: bool = False,
    ) -> None:
        """Do nothing yet."""
        self.on_collapse = on_collapse
        self.rollbacks = rollbacks
        self.folder = ""
        self.saves = False
        self.stopped: str | None = None
        self.skip_batches = skip_batches
        self._journal = journal
        self._alarm_step = 0

    @property
    def spares_weights(self) -> bool:
        """Whether a step whose gradients are not finite leaves the weights alone."""
        return self.on_collapse in ("stop", "rollback")

    @property
    def needs_first_checkpoint(self) -> bool:
        """Whether there has to be one from the first step on."""
        return self.on_collapse == "rollback"

    def act(self, alarm: Alarm, control: TrainerControl, suspicious: Sequence[int] = ()) -> None:
        """Say and write down an alarm, and do what is to be done.

        Args:
            alarm: that begins.
            control: of the Trainer.
            suspicious: steps whose batches may be to blame.
        """
        self._journal.write("alarm", self.rollbacks.count, alarm.step, alarm.to_dict())
        self._journal.say(str(alarm), is_alarm=True)
        self._alarm_step = alarm.step
        if callable(self.on_collapse):
            self.on_collapse(alarm, control)
        elif self.on_collapse == "checkpoint":
            control.should_save = True
        elif self.on_collapse == "stop":
            if not control.should_training_stop:
                self.stopped = f"on_collapse='stop', {alarm.kind}"
                self._write("stop", {"reason": self.stopped})
            control.should_training_stop = True
        elif self.on_collapse == "rollback" and self.rollbacks.planned is None:
            control.should_training_stop, control.should_save = True, False
            self._plan_rollback(suspicious if self.skip_batches else ())

    def take_rollback(self, callback: str) -> str | None:
        """Return the checkpoint that training is to resume from, if an alarm asked for it.

        Args:
            callback: name of the callback's class, under which checkpoints keep its state.
        """
        planned, self.rollbacks.planned = self.rollbacks.planned, None
        if planned is None:
            return None
        folder = checkpoint(self.folder, planned.step)
        # The Trainer, or anyone else, may have deleted it while training came to its end.
        if not value_of_first_rank(os.path.isdir(folder)):
            self._give_up(f"{folder} was deleted before training could resume from it")
            return None
        self.rollbacks.due = self.rollbacks.next
        if self.saves:
            self._make_last(folder, planned.step, callback)
        values_of_all_ranks(None)  # nobody reads the checkpoint before it is written
        return folder

    def resume(self, step: int, optimizer: Any, scheduler: Any) -> None:
        """Do what a rollback to the checkpoint that training resumes from asks for, if one did."""
        due, factor = self.rollbacks.due, self.rollbacks.take()
        if due is None or factor is None:
            return
        scale_rates(optimizer, scheduler, factor)
        self._journal.say(
            f"back at step {step}, rollback {due.rollbacks} of at most {self.rollbacks.most}: "
            f"training goes on with {due.lr_scale:g} times the learning rate"
            + _without(due.skips, step)
        )

    def note_skip(self, step: int) -> None:
        """Say and write down that the batches of a step were skipped."""
        self._journal.write("skip", self.rollbacks.count, step, {})
        self._journal.say(f"the batches of step {step} were skipped: weights are as before")

    def _plan_rollback(self, suspicious: Sequence[int]) -> None:
        why, back = self.rollbacks.plan(self.folder, suspicious), self.rollbacks
        # One decision for all: the disk that each process sees need not be the same.
        why, back.planned, back.planned_skips = value_of_first_rank(
            (why, back.planned, back.planned_skips)
        )
        planned = back.planned
        if planned is None:
            return self._give_up(str(why))
        due = back.next
        values: dict[str, Any] = {"to_step": planned.step, "lr_scale": due.lr_scale}
        if skips := [step for step in due.skips if step > planned.step]:
            values["skips"] = skips
        self._write("rollback", values)
        self._journal.say(
            f"rollback {due.rollbacks} of at most {back.most}: resuming from step {planned.step} "
            f"with {due.lr_scale:g} times the learning rate{_without(skips, planned.step)}"
        )
        if late := [step for step in suspicious if step <= planned.step]:
            self._journal.say(
                f"no healthy checkpoint is older than step {late[0]}, whose batch is suspicious: "
                "what it did to the weights stays"
            )

    def _make_last(self, folder: str, step: int, callback: str) -> None:
        """See to it that a run which dies now resumes from this checkpoint, as it is to go on."""
        due = self.rollbacks.next
        try:
            write_due(folder, callback, due)
            moved = abandon_checkpoints(self.folder, after=step, until=self._alarm_step)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"training goes back to {folder}; if it dies before its next checkpoint, resume it "
                f"from there by hand, at {due.lr_scale:g} times the rate, since this could not be "
                f"written down ({reason_of(error)})",
                UserWarning,
                stacklevel=4,
            )
            return
        if moved is not None:
            self._journal.say(f"the checkpoints after step {step} were moved to {moved}")

    def _give_up(self, why: str) -> None:
        self.stopped = why
        self._write("stop", {"reason": why})
        self._journal.say(f"training stops at step {self._alarm_step}: {why}")

    def _write(self, event: str, values: dict[str, Any]) -> None:
        self._journal.write(event, self.rollbacks.count, self._alarm_step, values)


def _without(skips: Sequence[int], step: int) -> str:
    """Say which steps after a step are without their batches."""
    later = [str(skip) for skip in skips if skip > step]
    named = f"step {later[0]}" if len(later) == 1 else f"steps {', '.join(later)}"
    return f", without the batches of {named}" if later else ""

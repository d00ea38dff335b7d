"""Keeps the micro-batches before an alarm, and writes down what may have caused it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from hf_stable._file_names import BATCH_FOLDER
from hf_stable._ranks import values_of_all_ranks
from hf_stable.monitor.alarms import Alarm
from hf_stable.monitor.batches.files import MOST_BYTES, MOST_FILES, BatchFolder, previews_of
from hf_stable.monitor.batches.positions import Positions
from hf_stable.monitor.batches.ring import BatchRing, KeepBatches, MicroBatch
from hf_stable.monitor.batches.sample_losses import (
    LossOf,
    count_samples,
    losses_of_samples,
    why_not_by_sample,
)
from hf_stable.monitor.journal import Journal
from hf_stable.monitor.missing import Missing, reason_of

__all__ = ["MOST_SAMPLES", "Keeping"]

MOST_SAMPLES = 256
"""Samples whose loss is computed at an alarm, each by a forward of its own."""


class Keeping:
    """Follows the micro-batches of a run; at an alarm writes those that may be to blame.

    Args:
        keep: as StabilityCallback's `keep_batches`; with 0 nothing happens here.
        journal: in which it is written down.
        missing: takes what fails.
    """

    def __init__(self, keep: KeepBatches, journal: Journal, missing: Missing) -> None:
        """Keep nothing yet."""
        self.ring = BatchRing(keep)
        self._journal = journal
        self._missing = missing
        self._positions = Positions()
        self._loss_of: LossOf | None = None
        self._untold: tuple[int, int, dict[str, Any], str] | None = None
        self._processing: Any = None
        self._folder = BatchFolder("", 0)
        self._step = self._epoch = self._micro = 0
        self._in_epoch = self._resumed_at = 0

    def __bool__(self) -> bool:
        """Say whether anything is kept."""
        return self.ring.keep != 0

    def begin(
        self, folder: str, args: TrainingArguments, state: TrainerState, objects: Mapping[str, Any]
    ) -> None:
        """Take up a run.

        Args:
            folder: output folder of the run.
            args: of the Trainer.
            state: likewise, at the step that training begins or resumes at.
            objects: what the Trainer gives its callbacks beside these.
        """
        self.stop()
        if not self:
            return
        self._folder = BatchFolder(folder, args.process_index)
        self._processing = objects.get("processing_class")
        loader = objects.get("train_dataloader")
        self._resumed_at = 0 if args.ignore_data_skip else _batches_done(loader, args, state)
        self._positions.listen(loader)
        if not state.global_step and state.is_local_process_zero:
            with self._missing.bearing(f"what an earlier run left in {BATCH_FOLDER}"):
                self._folder.set_aside()

    def begin_epoch(self) -> None:
        """Count micro-batches anew; in the first epoch after a resume from where it was."""
        self._in_epoch, self._resumed_at = self._resumed_at, 0
        self._positions.begin_epoch()

    def begin_step(self, step: int, epoch: float) -> None:
        """Count the micro-batches of a step."""
        self._step, self._epoch, self._micro = step, int(epoch), 0

    def pass_by(self) -> None:
        """Count a micro-batch that is skipped."""
        self._in_epoch += 1

    def add(self, inputs: Mapping[str, Any], loss_of: LossOf) -> None:
        """Take a micro-batch before it is trained on."""
        if not self:
            return
        self._loss_of = loss_of
        with self._missing.bearing("a micro-batch"):
            positions = self._positions.take(self._in_epoch)
            batch = MicroBatch(self._step, self._micro, self._epoch, inputs, positions)
            self.ring.add(batch)
        self._micro += 1
        self._in_epoch += 1

    def note_loss(self, loss: Tensor) -> None:
        """Take the loss, (), of the micro-batch that was added last."""
        self.ring.note_loss(loss)

    def write(
        self, alarms: Sequence[Alarm], steps: Sequence[int], attempt: int, model: nn.Module
    ) -> None:
        """Write the micro-batches of suspicious steps; every process has to call it.

        What was written is told by `tell`.

        Args:
            alarms: of which the first counts.
            steps: that are suspicious.
            attempt: how many rollbacks came before.
            model: as it was when the alarm came.
        """
        if not self or not steps:
            return
        alarm = alarms[0]
        every = values_of_all_ranks(self._write_own(alarm, steps, attempt, model))
        files = [name for each in every for name in each.files]
        num_bytes = sum(each.num_bytes for each in every)
        left_out = sum(each.left_out for each in every)
        line = {"kind": alarm.kind, "steps": list(steps), "files": files, "left_out": left_out}
        said = (
            f"{len(files)} micro-batches up to step {alarm.step} are kept in {self._folder.path} "
            f"({num_bytes / 1e6:.1f} MB); hf-stable report shows them"
        )
        if left_out:
            said += (
                f". {left_out} more are left out: each process keeps {MOST_FILES} files and "
                f"{MOST_BYTES >> 20} MiB of a run at most"
            )
        self._untold = (attempt, alarm.step, line, said)

    def tell(self) -> None:
        """Say and write down what was written since the last time, if anything was."""
        if self._untold is not None:
            attempt, step, line, said = self._untold
            self._journal.write("batches", attempt, step, line)
            if line["files"] or line["left_out"]:
                self._journal.say(said)
        self._untold = None

    def stop(self) -> None:
        """Let everything go."""
        self._positions.stop()
        self.ring.clear()
        self._loss_of = self._processing = self._untold = None

    def _write_own(
        self, alarm: Alarm, steps: Sequence[int], attempt: int, model: nn.Module
    ) -> _Written:
        found = _Written()
        chosen = [b for b in self.ring.held() if self.ring.keep != "auto" or b.step in steps]
        # The worst first, as far as samples are measured and there is room.
        chosen.sort(key=lambda batch: (batch.step in steps, _badness(batch)), reverse=True)
        room = MOST_SAMPLES
        for batch in chosen:
            count = count_samples(batch.inputs) or 0
            about = self._about(batch, alarm, steps, attempt) | self._by_sample(batch, model, room)
            room -= count
            name, num_bytes = self._folder.name_of(batch, attempt), None
            with self._missing.bearing("a suspicious batch"):
                num_bytes = self._folder.write(name, batch.inputs, about)
                if num_bytes is None:
                    found.left_out += 1
            if num_bytes is not None:
                found.files.append(name)
                found.num_bytes += num_bytes
        return found

    def _about(
        self, batch: MicroBatch, alarm: Alarm, steps: Sequence[int], attempt: int
    ) -> dict[str, Any]:
        return {
            "step": batch.step,
            "attempt": attempt,
            "micro_batch": batch.number,
            "rank": self._folder.rank,
            "epoch": batch.epoch,
            "alarm": {"kind": alarm.kind, "step": alarm.step},
            "is_suspicious": batch.step in steps,
            "positions": batch.positions,
            "positions_unknown": "" if batch.positions is not None else self._why_no_positions(),
            "loss": None if batch.loss is None else float(batch.loss),
        }

    def _why_no_positions(self) -> str:
        return self._positions.unknown or "the sampler yields no lists of positions"

    def _by_sample(self, batch: MicroBatch, model: nn.Module, room: int) -> dict[str, Any]:
        """Return what is known of each sample, or why it is not."""
        losses: list[float] | None = None
        previews: list[str] | None = None
        count, reason = count_samples(batch.inputs) or 0, why_not_by_sample(model)
        if not reason and count > room:
            reason = f"at an alarm the losses of {MOST_SAMPLES} samples are computed at most"
        if not reason and self._loss_of is not None:
            try:
                losses = losses_of_samples(batch.inputs, self._loss_of, model)
            except Exception as error:
                reason = reason_of(error)
        with self._missing.bearing("previews of samples"):
            previews = previews_of(batch.inputs, self._processing)
        return {"sample_losses": losses, "no_sample_losses": reason, "previews": previews}


@dataclass
class _Written:
    """What a process has written at an alarm."""

    files: list[str] = field(default_factory=list)
    num_bytes: int = 0
    left_out: int = 0


def _badness(batch: MicroBatch) -> float:
    loss = math.nan if batch.loss is None else float(batch.loss)
    return loss if math.isfinite(loss) else math.inf


def _batches_done(loader: Any, args: TrainingArguments, state: TrainerState) -> int:
    """Return how many micro-batches of its epoch a resumed run has behind it, as the Trainer."""
    try:
        length = len(loader)
    except TypeError:
        return 0
    steps = max(1, math.ceil(length / args.gradient_accumulation_steps))
    return state.global_step % steps * args.gradient_accumulation_steps

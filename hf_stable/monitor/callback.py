"""StabilityCallback: what is done at each of a Trainer's events.

Longer than others: more than a quarter of it is documentation, and each event has its method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_stable.monitor.acting import Acting
from hf_stable.monitor.alarms import Alarm, AlarmRules
from hf_stable.monitor.batches.keeping import Keeping
from hf_stable.monitor.batches.ring import KeepBatches
from hf_stable.monitor.console import shorten
from hf_stable.monitor.journal import Journal
from hf_stable.monitor.missing import Missing
from hf_stable.monitor.options import Console, Options, check_training, refuse_cut_attention
from hf_stable.monitor.probing import Records, is_blind, probe
from hf_stable.monitor.progress import Progress
from hf_stable.monitor.readings import remedies_in_place
from hf_stable.monitor.rollbacks import Rollbacks
from hf_stable.monitor.step import WatchedStep
from hf_stable.monitor.thresholds import Thresholds
from hf_stable.monitor.trackers import alert_trackers

__all__ = ["StabilityCallback"]


class StabilityCallback(TrainerCallback, ExportableState):
    """Shows, while a Trainer trains, whether attention collapses, where, how, and acts on it.

    It probes inside training steps that run anyway (`hf_stable.probe`). Three kinds of steps are
    probed: every `every`-th; before the first of these, steps 1, 2, 4, ...; and while the loss
    rises, one in `every // 10`. Weights, losses and random numbers are those of a run without it.
    Under torch.compile a probed step runs uncompiled, and draws the dropout masks of uncompiled
    code.

    Values go to `trainer.state.log_history` and every tracker at the step that they belong to
    (under the keys of `hf_stable.monitor.terms`), and in full to `stability.jsonl` in the output
    folder. For that, a record is written at each multiple of `every` even between two logging
    steps (not with logging_strategy="no"): the Trainer then averages the logged loss from record
    to record, over a shorter stretch. With `every` a multiple of logging_steps nothing changes.

    The rule of alarms is stated in `hf_stable.monitor.alarms`. Each alarm is a line on stderr and
    one in `stability.jsonl`, once per event, and beyond that what `on_collapse` says. On several
    processes all act on the mean loss and on what their batches show together, which is what one
    process with the same global batch sees (`hf_stable.monitor.combining`).

    It ends no training: what cannot be measured or written is missing, and warned of once. One
    training at a time writes into an output folder; a second one is refused when it begins.

    Args:
        every: steps from probe to probe.
        queries: rows of each attention map to measure, "all" or a number.
        terms: what to record: "default", "all" or names from `hf_stable.monitor.terms`.
        maps: heads whose subsampled maps `stability.jsonl` keeps: False, "all" or indices.
        sharpness_every: steps from one measurement of sharpness to the next, on the loss that the
            Trainer computes for the first micro-batch; it costs as much as some sixty backward
            passes, and two copies of a step's memory without checkpointing. None: never.
        on_collapse: at an alarm: "warn" says so only; "stop" ends training cleanly; "checkpoint"
            saves at once; "rollback" resumes from the last healthy checkpoint at a lower rate. Or a
            function, called with the `Alarm` and the TrainerControl. Before "stop" and "rollback"
            a step whose gradients are not finite leaves the weights alone.
        max_rollbacks: after so many, an alarm stops the run.
        rollback_lr_factor: each rollback multiplies all rates by this.
        log_layers: log the worst head of every layer too, not aggregates only.
        console: what the Trainer prints of a record: "short" has one part with the lowest entropy
            and the largest sigma(Wq^T Wk), where they are, and alarms so far, in place of some
            thirty keys; "full" has all keys, "off" none. Alarms are said in any case.
        thresholds: of the alarms, other than the defaults; also by name, as a mapping.
        keep_batches: micro-batches of each process that are written into the output folder at an
            alarm "spike" or "nonfinite", with the loss of each sample: 0 for none, for data that
            must not be written down; a number, of which copies are kept meanwhile; "auto" for
            those of the last six steps, uncopied, of which the suspicious ones are written.
        skip_batches: after a rollback for such an alarm the batches of the suspicious steps are
            skipped: these steps leave weights and optimizer alone, and the schedule goes on.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(
        self,
        every: int = 50,
        queries: Literal["all"] | int = 64,
        terms: Literal["default", "all"] | Sequence[str] = "default",
        maps: bool | Literal["all"] | Sequence[int] = False,
        sharpness_every: int | None = None,
        on_collapse: str | Callable[[Alarm, TrainerControl], Any] = "warn",
        *,
        max_rollbacks: int = 3,
        rollback_lr_factor: float = 0.5,
        log_layers: bool = False,
        console: Console = "short",
        thresholds: Thresholds | Mapping[str, float] | None = None,
        keep_batches: KeepBatches = 0,
        skip_batches: bool = False,
    ) -> None:
        """Check the options; nothing is touched before training begins."""
        self.options = Options(
            every, queries, terms, maps, sharpness_every, on_collapse, max_rollbacks,
            rollback_lr_factor, log_layers, console, thresholds, keep_batches, skip_batches,
        )  # fmt: skip
        self.progress: dict[str, Any] = {}  # the Trainer may set it; a run's own is in its state
        rollbacks = Rollbacks(max_rollbacks, rollback_lr_factor)
        self._run = Progress(rollbacks, self.options.thresholds)
        self._journal = Journal()
        self._acting = Acting(on_collapse, rollbacks, self._journal, skip_batches=skip_batches)
        self._stack = ExitStack()
        self._missing = Missing()
        self._keeping = Keeping(keep_batches, self._journal, self._missing)
        self._expected_folder: str | None = None
        self._is_blind = False
        self._started = 0.0
        self._step = WatchedStep(self._run, self._missing)

    @property
    def rules(self) -> AlarmRules:
        """The rules of alarms, with what they have seen."""
        return self._run.rules

    @property
    def rollbacks(self) -> Rollbacks:
        """The ways back, taken and planned."""
        return self._run.rollbacks

    # What the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work, now and not at the first probe; take up a resumed run."""
        self.abandon_step()
        self._started = time.perf_counter()
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        # The Trainer fails to save where a checkpoint of a run without it left no entry for it.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {})
        check_training(args, model, saved, self.options)
        self._is_blind = is_blind(
            model, queries=self.options.queries, terms=self.options.terms,
            maps=self.options.wanted_maps,
        )  # fmt: skip
        self._acting.folder = self._expected_folder or args.output_dir or "."
        self._acting.saves, self._acting.stopped = args.should_save, None
        self._journal.open(self._acting.folder, writes=state.is_world_process_zero)
        self._run.begin(self.options.thresholds)
        self.rules.in_place = remedies_in_place(model, optimizer)
        if not state.global_step:
            self.rollbacks.due = None  # of a run that never came to resume
        elif saved:
            self._run.load_saved(saved, state.global_step)
        self._acting.resume(state.global_step, optimizer, kwargs.get("lr_scheduler"))
        self._journal.begin(self.rollbacks.count, state.global_step)
        self._keeping.begin(self._acting.folder, args, state, kwargs)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the batches of an epoch."""
        self._keeping.begin_epoch()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open a probe if this step is due."""
        step, options = state.global_step + 1, self.options
        sharpness_every = options.sharpness_every
        self._step = WatchedStep(
            self._run, self._missing,
            wants_sharpness=bool(sharpness_every) and step % sharpness_every == 0,
            is_skipped=step in self.rollbacks.skips,
        )  # fmt: skip
        self._keeping.begin_step(step, state.epoch or 0.0)
        if self._step.is_skipped or self._is_blind or not self._run.is_due(step, options.every):
            return
        # The rows depend on the step alone: a resumed run samples what an unbroken one does.
        generator = torch.Generator().manual_seed(step)
        self._step.records = Records()  # also where the probe fails: all processes have to meet
        with self._missing.bearing("attention"):
            self._step.records = self._stack.enter_context(
                probe(
                    kwargs["model"], queries=options.queries, terms=options.terms,
                    maps=options.wanted_maps, generator=generator,
                )
            )  # fmt: skip

    def loss_of_skipped(self) -> float | None:
        """Return what stands for the loss of a step that is skipped; None where it is trained on.

        The Trainer averages the losses that it logs: with the last one the mean stays what it is.
        """
        if not self._step.is_skipped:
            return None
        self._keeping.pass_by()
        return self._run.recent.last or 0.0

    def observe_batch(
        self, inputs: Mapping[str, Any], loss_of: Callable[[Mapping[str, Any]], Tensor]
    ) -> None:
        """Take the inputs of a micro-batch before it is trained on.

        Args:
            inputs: as the data loader made them.
            loss_of: computes the loss of such inputs, or of a part of them.
        """
        self._keeping.add(inputs, loss_of)

    def observe_loss(self, loss: Tensor, loss_again: Callable[[], Tensor] | None = None) -> None:
        """Take the loss of one micro-batch, as the Trainer adds them up.

        Args:
            loss: ().
            loss_again: computes it once more; `sharpness_every` needs it.

        Raises:
            RuntimeError: if `sharpness_every` is set and `loss_again` is missing.
        """
        if self.options.sharpness_every and loss_again is None:
            raise RuntimeError(
                "sharpness_every needs a loss that can be computed again: pass loss_again to "
                "observe_loss, or leave sharpness_every out"
            )
        self._step.add_loss(loss, loss_again)
        self._keeping.note_loss(loss)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the step's loss and gradients and what the probe saw; judge them."""
        self._stack.close()
        model, step = kwargs["model"], state.global_step + 1
        if not self._step.is_skipped:
            self._step.judge(step, model, kwargs["optimizer"])
        self._keeping.write(self._step.alarms, self._step.suspicious, self.rollbacks.count, model)
        is_bad = any(alarm.kind == "nonfinite" for alarm in self._step.alarms)
        if self._step.is_skipped or (is_bad and self._acting.spares_weights):
            for parameter in model.parameters():
                parameter.grad = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the rates of AdamW2 while the groups still have those of this step."""
        self._step.read_rates(kwargs["model"], kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write down and log what was seen, and act on alarms."""
        step = state.global_step
        if self._step.is_skipped:
            self._acting.note_skip(step)
        if self._step.has_something:
            line = self._step.publish(kwargs["model"], log_layers=self.options.log_layers)
            self._journal.write("probe", self.rollbacks.count, step, line)
        regular = step % self.options.every == 0 or bool(self._step.alarms)
        if regular and args.logging_strategy != "no":
            control.should_log = True
        if self._acting.needs_first_checkpoint and step == 1:
            control.should_save = True  # there is always something to go back to
        for alarm in self._step.alarms:
            self._acting.act(alarm, control, self._step.suspicious)
            if state.is_world_process_zero:
                alert_trackers(args.report_to, f"{alarm.kind} at step {alarm.step}", str(alarm))
        self._keeping.tell()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember a checkpoint that was written while nothing was wrong."""
        if not self.rules.is_suspicious:
            self.rollbacks.note(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was found; write down how long it took."""
        seconds = round(time.perf_counter() - self._started, 1)
        self._journal.write("end", self.rollbacks.count, state.global_step, {"seconds": seconds})
        self.abandon_step()

    # What the Trainer's wrappers call

    def abandon_step(self) -> None:
        """Undo what was done to the model and to the folder for a training that ends here."""
        self._stack.close()
        self._step = WatchedStep(self._run, self._missing)
        self._keeping.stop()
        self._journal.close()

    def expect_checkpoints_in(self, folder: str) -> None:
        """Take the folder into which the Trainer will write its checkpoints: a search has many."""
        self._expected_folder = folder

    def refuse_cut_sequences(self, setting: str) -> None:
        """Raise ValueError if attention is to be measured, of which each process has a part."""
        refuse_cut_attention(self.options.terms, setting)

    def take_pending_logs(self) -> dict[str, float]:
        """Return the values for the record of this step, once."""
        pending, self._step.pending = self._step.pending, {}
        return pending

    def shorten_record(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return what of a record is printed on the console."""
        return shorten(record, self.options.console, self._step.short)

    def take_rollback(self) -> str | None:
        """Return the checkpoint folder that training is to resume from, if an alarm asks for it."""
        return self._acting.take_rollback(type(self).__name__)

    def why_it_stopped(self) -> str | None:
        """Return why this stopped the training that ended last; None where it did not."""
        return self._acting.stopped

    def state(self) -> dict[str, Any]:
        """Return options and progress for `trainer_state.json`."""
        return {"args": self.options.state(), "attributes": {"progress": self._run.state()}}

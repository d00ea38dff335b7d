"""StabilityCallback: when to probe, what to log, what to do at a collapse."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_stable._ranks import inner_optimizer, mean_over_ranks, value_of_first_rank
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.monitor.alarms import Alarm, AlarmRules, Thresholds
from hf_stable.monitor.combining import gather_records
from hf_stable.monitor.log_file import StabilityLog
from hf_stable.monitor.log_keys import aggregate
from hf_stable.monitor.options import action_name, as_thresholds, check_options
from hf_stable.monitor.probing import Records, probe
from hf_stable.monitor.readings import (
    check_sharpness_can_be_measured,
    effective_rates,
    gammas,
    gradients_are_finite,
    measure_loss_sharpness,
    scale_rates,
)
from hf_stable.monitor.rollbacks import Rollbacks, check_can_roll_back, checkpoint
from hf_stable.monitor.trackers import alert_trackers

__all__ = ["StabilityCallback"]

SCALER_PATIENCE = 10
"""Steps in a row with infinite gradients that a GradScaler looking for its scale may take."""


class StabilityCallback(TrainerCallback, ExportableState):
    """Shows, while a Trainer trains, whether attention collapses, where, how, and acts on it.

    It probes inside training steps that run anyway (`hf_stable.probe`): every `every` steps, at
    steps 1, 2, 4, ... before the first of them, and while the loss is rising, at most every
    `every // 10` steps. Weights, losses and random numbers are those of a run without it; but under
    torch.compile a probed step runs uncompiled, and draws dropout masks as uncompiled code does.

    Values go to `trainer.state.log_history` and every tracker at the step that they belong to
    (under the keys of `hf_stable.monitor.terms`), and in full to `stability.jsonl` in the output
    folder. For that, a record is written at each multiple of `every` even between two logging
    steps (not with logging_strategy="no"): the Trainer then averages the logged loss from record
    to record, over a shorter stretch. With `every` a multiple of logging_steps nothing changes.

    The rule of alarms is stated in `hf_stable.monitor.alarms`. Each alarm is a warning and a line
    in `stability.jsonl`, once per event, and beyond that what `on_collapse` says. On several
    processes all act on the mean loss and on what their batches show together, which is what one
    process with the same global batch sees (`hf_stable.monitor.combining`).

    Args:
        every: steps from probe to probe.
        queries: rows of each attention map to measure, "all" or a number.
        terms: what to record: "default", "all" or names from `hf_stable.monitor.terms`.
        maps: heads whose subsampled maps `stability.jsonl` keeps: False, "all" or indices.
        sharpness_every: steps from one measurement of sharpness to the next, on the loss that the
            Trainer computes for the first micro-batch; it costs as much as some sixty backward
            passes, and two copies of a step's memory without checkpointing. None: never.
        on_collapse: at an alarm: "warn" only; "stop" ends training cleanly; "checkpoint" saves at
            once; "rollback" resumes from the last healthy checkpoint at a lower rate. Or a
            function, called with the `Alarm` and the TrainerControl. Before "stop" and "rollback"
            a step whose gradients are not finite leaves the weights alone.
        max_rollbacks: after so many, an alarm stops the run.
        rollback_lr_factor: each rollback multiplies all rates by this.
        log_layers: log the worst head of every layer too, not aggregates only.
        thresholds: of the alarms, other than the defaults; also by name, as a mapping.

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
        thresholds: Thresholds | Mapping[str, float] | None = None,
    ) -> None:
        """Check the options; nothing is touched before training begins."""
        check_options(
            every=every, queries=queries, terms=terms, maps=maps, sharpness_every=sharpness_every,
            on_collapse=on_collapse, max_rollbacks=max_rollbacks,
            rollback_lr_factor=rollback_lr_factor,
        )  # fmt: skip
        self.every = every
        self.queries = queries
        self.terms = terms
        self.maps: Any = maps if maps is not True else "all"
        self.sharpness_every = sharpness_every
        self.on_collapse = on_collapse
        self.log_layers = log_layers
        self.thresholds = as_thresholds(thresholds)
        self.progress: dict[str, Any] = {}
        self._stack = ExitStack()
        self.rollbacks = Rollbacks(max_rollbacks, rollback_lr_factor)
        self._folder = ""
        self._alarm_step = 0
        self._started = 0.0
        self._begin()

    def _begin(self) -> None:
        """Forget everything about a run."""
        self.rules = AlarmRules(self.thresholds)
        self.nonfinite_steps = 0
        self.num_alarms = 0
        self.rollbacks.begin()
        self._last_probe = 0
        self._nonfinite_streak = 0
        self._reset_step()

    def _reset_step(self) -> None:
        self._loss: Tensor | None = None
        self._loss_again: Callable[[], Tensor] | None = None
        self._wants_sharpness = False
        self._records: Records | None = None
        self._values: dict[str, Any] = {}
        self._alarms: list[Alarm] = []
        self._pending: dict[str, float] = {}

    # What the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work, now and not at the first probe; take up a resumed run."""
        self._stack.close()
        self._started = time.perf_counter()
        model = kwargs["model"]
        # The Trainer fails to save where a checkpoint of a run without it left no entry for it.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {})
        if isinstance(saved, list):
            raise ValueError("this Trainer has two StabilityCallbacks: remove one of them")
        if callable(self.on_collapse) and args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "a checkpoint cannot hold on_collapse as a function: leave "
                "restore_callback_states_from_checkpoint out (progress is taken up without it)"
            )
        if self.on_collapse == "rollback":
            check_can_roll_back(args)
        if self.sharpness_every:
            check_sharpness_can_be_measured(args, model)
        with probe(model, queries=self.queries, terms=self.terms, maps=self.maps or ()):
            pass  # raises for a model that cannot be probed
        self._writes = state.is_world_process_zero
        self._folder = args.output_dir or "."
        self._log = StabilityLog(self._folder) if self._writes else None
        going_back, rollbacks = self.rollbacks.planned is not None, self.rollbacks.count
        self._begin()
        if state.global_step:
            self._restore(saved["attributes"]["progress"] if saved else {}, state.global_step)
        if going_back:
            factor = self.rollbacks.take(rollbacks)
            scale_rates(kwargs["optimizer"], kwargs["lr_scheduler"], factor)
        elif self._log is not None:
            if state.global_step:
                self._log.resume(self.rollbacks.count, state.global_step)
            else:
                self._log.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open a probe if this step is due."""
        self._reset_step()
        step = state.global_step + 1
        self._wants_sharpness = bool(self.sharpness_every) and step % self.sharpness_every == 0
        if self._is_due(step):
            self._last_probe = step
            # The rows depend on the step alone: a resumed run samples what an unbroken one does.
            generator = torch.Generator().manual_seed(step)
            self._records = self._stack.enter_context(
                probe(
                    kwargs["model"], queries=self.queries, terms=self.terms,
                    maps=self.maps or (), generator=generator,
                )
            )  # fmt: skip

    def observe_loss(self, loss: Tensor, loss_again: Callable[[], Tensor] | None = None) -> None:
        """Take the loss of one micro-batch, as the Trainer adds them up.

        Args:
            loss: ().
            loss_again: computes it once more; `sharpness_every` needs it.
        """
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss
        if self._wants_sharpness and self._loss_again is None:
            self._loss_again = loss_again  # of the first micro-batch

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the step's loss and gradients and what the probe saw; judge them."""
        self._stack.close()
        model, step = kwargs["model"], state.global_step + 1
        if self._loss is None:
            raise RuntimeError(
                "StabilityCallback saw no loss: a Trainer whose training_step does not call the "
                "Trainer's own has to call observe_loss(loss) of the callback"
            )
        loss, share = mean_over_ranks(self._loss, gradients_are_finite(model))
        self._judge(step, loss, share == 1, scaled=_has_scaler(kwargs["optimizer"]))
        if self._wants_sharpness:
            if self._loss_again is None:
                raise RuntimeError(
                    "sharpness_every needs a loss that can be computed again: pass loss_again to "
                    "observe_loss, or leave sharpness_every out"
                )
            self._values |= measure_loss_sharpness(self._loss_again, model, kwargs["optimizer"])
        if self.on_collapse in ("stop", "rollback") and any(
            alarm.kind == "nonfinite" for alarm in self._alarms
        ):
            for parameter in model.parameters():
                parameter.grad = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the rates of AdamW2 while the groups still have those of this step."""
        optimizer = inner_optimizer(kwargs["optimizer"])
        if isinstance(optimizer, AdamW2) and (self._values or self._records is not None):
            rates, clipped = effective_rates(optimizer, kwargs["model"])
            self._values["effective_lr"] = rates
            self._pending["stability/clipped_share"] = clipped

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write down and log what was seen, and act on alarms."""
        step = state.global_step
        if self._values or self._records is not None:
            self._publish(step, kwargs["model"])
        regular = step % self.every == 0 or bool(self._alarms)
        if regular and args.logging_strategy != "no":
            control.should_log = True
        if self.on_collapse == "rollback" and step == 1:
            control.should_save = True  # there is always something to go back to
        for alarm in self._alarms:
            self._act(alarm, control)
            if self._writes:
                alert_trackers(args.report_to, f"{alarm.kind} at step {alarm.step}", str(alarm))

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
        self.abandon_step()
        seconds = round(time.perf_counter() - self._started, 1)
        self._write("end", state.global_step, {"seconds": seconds})

    def abandon_step(self) -> None:
        """Undo what was done to the model for a step that will not be finished."""
        self._stack.close()
        self._reset_step()

    def take_pending_logs(self) -> dict[str, float]:
        """Return the values for the record of this step, once."""
        pending, self._pending = self._pending, {}
        return pending

    def take_rollback(self) -> str | None:
        """Return the checkpoint folder that training is to resume from, if an alarm asks for it."""
        planned = self.rollbacks.planned
        if planned is None:
            return None
        folder = checkpoint(self._folder, planned.step)
        # The Trainer, or anyone else, may have deleted it while training came to its end.
        if value_of_first_rank(os.path.isdir(folder)):
            return folder
        self.rollbacks.planned = None
        self._give_up(f"{folder} was deleted before training could resume from it")
        return None

    def state(self) -> dict[str, Any]:
        """Return options and progress for `trainer_state.json`."""
        return {
            "args": {
                "every": self.every,
                "queries": self.queries,
                "terms": self.terms if isinstance(self.terms, str) else list(self.terms),
                "maps": self.maps if isinstance(self.maps, bool | str) else list(self.maps),
                "sharpness_every": self.sharpness_every,
                "on_collapse": action_name(self.on_collapse),
                "max_rollbacks": self.rollbacks.most,
                "rollback_lr_factor": self.rollbacks.factor,
                "log_layers": self.log_layers,
                "thresholds": None if self.thresholds is None else asdict(self.thresholds),
            },
            "attributes": {
                "progress": {
                    "rules": self.rules.state(),
                    "nonfinite_steps": self.nonfinite_steps,
                    "nonfinite_streak": self._nonfinite_streak,
                    "num_alarms": self.num_alarms,
                    "rollbacks": self.rollbacks.state(),
                    "last_probe": self._last_probe,
                }
            },
        }

    # What happens within

    def _restore(self, progress: dict[str, Any], step: int) -> None:
        if not progress:
            return  # the checkpoint is of a run without this callback
        self.rules.load_state(progress["rules"])
        self.nonfinite_steps = progress["nonfinite_steps"]
        self._nonfinite_streak = progress["nonfinite_streak"]
        self.num_alarms = progress["num_alarms"]
        self.rollbacks.load_state(progress["rollbacks"])
        self._last_probe = progress["last_probe"]
        if not self.rules.is_suspicious:
            self.rollbacks.note(step)  # it was written after its own state

    def _is_due(self, step: int) -> bool:
        is_early = step < self.every and step & (step - 1) == 0  # 1, 2, 4, ...
        waited = step - self._last_probe >= max(1, self.every // 10)
        return is_early or step % self.every == 0 or (self.rules.is_rising and waited)

    def _judge(self, step: int, loss: float, finite: bool, *, scaled: bool) -> None:
        self._nonfinite_streak = 0 if finite else self._nonfinite_streak + 1
        loss_is_finite = loss - loss == 0
        self.nonfinite_steps += not (finite and loss_is_finite)
        bearable = scaled and self._nonfinite_streak <= SCALER_PATIENCE
        self._alarms = self.rules.observe_loss(step, loss, finite or bearable)
        if self._records is not None:
            quantities = gather_records(self._records)
            self._values = {"loss": loss if loss_is_finite else None, "quantities": quantities}
            self._alarms += self.rules.observe_probe(step, quantities)

    def _publish(self, step: int, model: nn.Module) -> None:
        quantities = self._values.setdefault("quantities", {})
        found = gammas(model)
        if found:
            quantities["gamma"] = found
        self._pending |= aggregate(quantities, layers=self.log_layers)
        if "effective_lr" in self._values:
            self._pending |= aggregate({"effective_lr": self._values["effective_lr"]})
        for name in ("sharpness", "sharpness_threshold", "sharpness_preconditioned"):
            if self._values.get(name) is not None:
                self._pending[f"stability/{name}"] = float(self._values[name])
        self._pending["stability/nonfinite_steps"] = float(self.nonfinite_steps)
        self._pending["stability/alarms"] = float(self.num_alarms + len(self._alarms))
        self._pending["stability/rollbacks"] = float(self.rollbacks.count)
        self._write("probe", step, self._values | {"nonfinite_steps": self.nonfinite_steps})

    def _act(self, alarm: Alarm, control: TrainerControl) -> None:
        self.num_alarms += 1
        self._write("alarm", alarm.step, alarm.to_dict())
        self._say(f"StabilityCallback: {alarm}")
        if callable(self.on_collapse):
            self.on_collapse(alarm, control)
        elif self.on_collapse == "checkpoint":
            control.should_save = True
        elif self.on_collapse == "stop":
            self._alarm_step = alarm.step
            if not control.should_training_stop:
                self._write("stop", alarm.step, {"reason": f"on_collapse='stop', {alarm.kind}"})
            control.should_training_stop = True
        elif self.on_collapse == "rollback" and self.rollbacks.planned is None:
            control.should_training_stop, control.should_save = True, False
            self._plan_rollback(alarm)

    def _plan_rollback(self, alarm: Alarm) -> None:
        self._alarm_step = alarm.step
        why = self.rollbacks.plan(self._folder)
        # One decision for all: the disk that each process sees need not be the same.
        why, self.rollbacks.planned = value_of_first_rank((why, self.rollbacks.planned))
        planned = self.rollbacks.planned
        if planned is None:
            return self._give_up(why)
        scale = self.rollbacks.next_scale
        self._write("rollback", alarm.step, {"to_step": planned.step, "lr_scale": scale})
        self._say(
            f"StabilityCallback: rollback {self.rollbacks.count + 1} of at most "
            f"{self.rollbacks.most}: resuming from step {planned.step} with {scale:g} times the "
            "learning rate"
        )

    def _give_up(self, why: str) -> None:
        self._write("stop", self._alarm_step, {"reason": why})
        self._say(f"StabilityCallback: training stops at step {self._alarm_step}: {why}")

    def _write(self, event: str, step: int, values: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(event, self.rollbacks.count, step, values)

    def _say(self, message: str) -> None:
        if self._writes:
            warnings.warn(message, UserWarning, stacklevel=2)


def _has_scaler(optimizer: Any) -> bool:
    return getattr(optimizer, "scaler", None) is not None

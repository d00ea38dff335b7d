"""What a leg does to a Trainer, in the process that trains: change, watch, stop after its steps."""

from __future__ import annotations

import copy
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from hf_stable._whole_files import write_whole
from hf_stable._wording import printable
from hf_stable.adamw2.planning import plan_tau
from hf_stable.commands.launch.attaching import Attachment
from hf_stable.commands.launch.options import RunOptions
from hf_stable.commands.preflight.legs import CONFIG_FILE, Ending, Leg, Settings, write_ending
from hf_stable.monitor.callback import StabilityCallback
from hf_stable.monitor.readings import scale_rates
from hf_stable.trainer.schedules import steps_at_full_rate

__all__ = ["LegRefused", "prepare", "quieten", "train_leg"]


class LegRefused(Exception):  # noqa: N818  # no error: the answer of a leg that makes no sense
    """The remedy of a leg does not go with the script; the message says why."""


def quieten(args: TrainingArguments, leg: Leg, folder: Path) -> None:
    """Turn off in a run's arguments what a preflight has no use for, in place.

    Evaluation, saving, pushing and trackers are off, output goes to the leg's own folder, every
    step is logged with the loss as it is, and the seeds are the leg's. Doing it again changes
    nothing.
    """
    args.output_dir = str(folder)
    args.report_to = []
    args.push_to_hub = False
    args.eval_strategy = IntervalStrategy.NO
    args.eval_on_start = False
    args.save_strategy = SaveStrategy.NO
    args.load_best_model_at_end = False
    args.logging_strategy = IntervalStrategy.STEPS
    args.logging_steps = 1
    args.logging_nan_inf_filter = False
    own = getattr(args, "_preflight_seeds", None) or (args.seed, args.data_seed)
    args._preflight_seeds = own  # survives a second call
    args.seed = own[0] + leg.seed
    args.data_seed = None if own[1] is None else own[1] + leg.seed


def prepare(trainer: Trainer, leg: Leg, settings: Settings, folder: Path) -> LegCallback:
    """Give a Trainer that has not trained yet the leg's remedy, the monitor, and its end.

    Args:
        trainer: as the script built it.
        leg: what to change.
        settings: how long, and how often to look.
        folder: of the leg.

    Raises:
        LegRefused: if the remedy cannot be given to this Trainer, or changes nothing about it.
    """
    args, remedy = trainer.args, leg.remedy
    quieten(args, leg, folder)
    _refuse_unfit(trainer, leg)
    callback = LegCallback(leg, settings, folder, _plan(trainer))
    # The first waits for evaluations, which are off; a monitor of the script's would write to the
    # same file, and may stop or go back; the others print every step of every leg.
    for theirs in (EarlyStoppingCallback, StabilityCallback, PrinterCallback, ProgressCallback):
        while trainer.pop_callback(theirs) is not None:
            pass
    if remedy.optim is not None:
        args.optim, args.optim_args = OptimizerNames(remedy.optim), remedy.optim_args or None
    if remedy.warmup is not None:
        args.warmup_steps = remedy.warmup
    if remedy.clip is not None:
        args.max_grad_norm = remedy.clip
    Attachment(RunOptions(patch=remedy.methods, monitor=settings.every)).add(trainer)
    trainer.add_callback(callback)
    return callback


def train_leg(train: Any, trainer: Trainer, callback: LegCallback, *args: Any, **kw: Any) -> Ending:
    """Run a Trainer's `train` for the leg's steps and write down how it ended.

    Args:
        train: called with the Trainer and the further arguments.
        trainer: prepared.
        callback: what `prepare` returned for it.
        args: of `train`.
        kw: likewise.
    """
    try:
        train(trainer, *args, **kw)
    except Exception:
        if callback.end != "nonfinite":
            raise
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(callback.folder / "trainer_state.json"))
        _write_config(trainer, callback.folder)
        write_ending(callback.folder, callback.ending(), callback.leg)
    return callback.ending()


def _write_config(trainer: Trainer, folder: Path) -> None:
    """Write the model's config beside the records: the report reads off it what guessing costs.

    A config that cannot be written is said, and does not make the leg one that failed.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if not isinstance(model, PreTrainedModel):
        return
    try:
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        text = config.to_json_string(use_diff=False)
    except Exception as error:  # whatever a class of the script's own raises
        said = (
            f"the config of {type(model).__name__} cannot be written as JSON ({error!r}), so this "
            "leg is judged without knowing the loss of a model that only guesses"
        )
        # No warning: a script may have turned warnings into errors.
        print(f"hf-stable preflight: {printable(said)}", file=sys.stderr, flush=True)
        return
    with write_whole(folder / CONFIG_FILE) as file:
        file.write(text)


class LegCallback(TrainerCallback):
    """Scales the rates of a leg, times its steps, and ends it: without a word to the script."""

    def __init__(self, leg: Leg, settings: Settings, folder: Path, plan: dict[str, Any]) -> None:
        """Note what the run was before the leg changed it.

        Args:
            leg: whose rates to scale.
            settings: how many steps.
            folder: of the leg.
            plan: of the run, as far as it is known before it trains.
        """
        self.leg, self.settings, self.folder = leg, settings, folder
        self.facts = plan
        self.end, self.steps = "training", 0
        self._first: int | None = None
        self._times: list[tuple[int, float]] = []
        self._started = 0.0

    def ending(self) -> Ending:
        """Return how the leg has ended so far."""
        usual = [seconds for step, seconds in self._times[1:] if step % self.settings.every]
        return Ending(
            key=self.leg.key(self.settings),
            end=self.end,
            steps=self.steps,
            seconds_per_step=median(usual) if usual else None,
            facts=self.facts,
        )

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None,
        lr_scheduler: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Scale every rate, whoever built the optimizer, now and for the whole schedule."""
        if self._first is not None:
            return
        self._first = state.global_step
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.facts |= {
            "max_steps": state.max_steps,
            "warmup_steps": args.get_warmup_steps(state.max_steps),
            "first_rate": max(rates),
            "tau": plan_tau(steps_at_full_rate(args, state.max_steps)),
        }
        scale_rates(optimizer, lr_scheduler, self.leg.factor)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop it, and the training after the leg's last step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._times.append((state.global_step, time.perf_counter() - self._started))
        self.steps = state.global_step - (self._first or 0)
        if self.steps >= self.settings.steps:
            self.end = "steps"
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        """End the leg at a loss that is not finite: more steps would say nothing new."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            self.end = "nonfinite"
            control.should_training_stop = True
        return control


def _plan(trainer: Trainer) -> dict[str, Any]:
    args = trainer.args
    model: Any = trainer.model
    return {
        "model": type(model).__name__,
        "learning_rate": args.learning_rate,
        "optim": str(getattr(args.optim, "value", args.optim)),
        "max_grad_norm": args.max_grad_norm,
        "own_optimizer": trainer.optimizer is not None,
        "own_schedule": trainer.lr_scheduler is not None,
    }


def _refuse_unfit(trainer: Trainer, leg: Leg) -> None:
    args, remedy = trainer.args, leg.remedy
    if trainer.optimizer is not None and remedy.needs_the_optimizer:
        raise LegRefused(
            "the script hands its own optimizer to the Trainer (optimizers=...), so neither "
            "another one nor a patched model's gamma can get into it; let the Trainer build it "
            "(optim=...)"
        )
    if trainer.lr_scheduler is not None and remedy.needs_the_schedule:
        raise LegRefused(
            "the script hands its own schedule to the Trainer (optimizers=...), which a warmup or "
            "another optimizer would need anew"
        )
    if remedy.clip is not None and 0 < (args.max_grad_norm or 0) <= remedy.clip:
        raise LegRefused(
            f"the script clips gradients at {args.max_grad_norm:g} already; clip:0.1 would clip "
            "harder"
        )
    if remedy.warmup is not None and args.warmup_steps and args.warmup_steps == remedy.warmup:
        raise LegRefused(f"the script warms up as long already ({args.warmup_steps:g})")

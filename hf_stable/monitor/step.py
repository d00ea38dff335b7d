"""One optimizer step under watch: its loss, what its probe saw, its alarms, what is logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_stable._ranks import inner_optimizer, mean_over_ranks
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.monitor.alarms import Alarm
from hf_stable.monitor.batches.suspects import suspicious_steps
from hf_stable.monitor.combining import gather_records
from hf_stable.monitor.console import summarise
from hf_stable.monitor.log_keys import aggregate
from hf_stable.monitor.missing import Missing
from hf_stable.monitor.probing import Records
from hf_stable.monitor.progress import Progress
from hf_stable.monitor.readings import (
    effective_rates,
    gammas,
    gradients_are_finite,
    measure_loss_sharpness,
)

__all__ = ["WatchedStep"]

SHARPNESS = ("sharpness", "sharpness_threshold", "sharpness_preconditioned")


class WatchedStep:
    """Takes what a step shows, judges it, and holds what is to be written of it.

    Args:
        run: how far the run is, with the rules of alarms.
        missing: takes what cannot be measured, and begins anew with the step.
        wants_sharpness: whether sharpness is to be measured.
        is_skipped: whether its batches are skipped, so that there is nothing to see.

    Attributes:
        loss: (), the sum of what was observed of micro-batches so far, or None.
        records: what the step's probe saw; None where it was not probed.
        alarms: that begin with the step.
        suspicious: steps whose batches may be to blame for them.
        pending: values for the Trainer's record.
        short: for the console; None as long as nothing was published.
        is_skipped: as given.
    """

    def __init__(
        self,
        run: Progress,
        missing: Missing,
        *,
        wants_sharpness: bool = False,
        is_skipped: bool = False,
    ) -> None:
        """Begin with nothing seen."""
        missing.clear()
        self.loss: Tensor | None = None
        self.records: Records | None = None
        self.alarms: list[Alarm] = []
        self.suspicious: list[int] = []
        self.pending: dict[str, float] = {}
        self.short: str | None = None
        self.is_skipped = is_skipped
        self._run = run
        self._missing = missing
        self._wants_sharpness = wants_sharpness
        self._loss_again: Callable[[], Tensor] | None = None
        self._values: dict[str, Any] = {}

    @property
    def has_something(self) -> bool:
        """Whether there is anything to publish."""
        wants = self._wants_sharpness and not self.is_skipped
        return bool(self._values) or self.records is not None or wants

    def add_loss(self, loss: Tensor, loss_again: Callable[[], Tensor] | None) -> None:
        """Add the loss of a micro-batch, and remember how that of the first is computed again."""
        loss = loss.detach().float()
        self.loss = loss if self.loss is None else self.loss + loss
        if self._wants_sharpness and self._loss_again is None:
            self._loss_again = loss_again

    def judge(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """Read loss and gradients and what the probe saw; every process has to call it.

        Args:
            step: its number.
            model: after its backward.
            optimizer: before it steps.

        Raises:
            RuntimeError: if no loss was observed.
        """
        if self.loss is None:
            raise RuntimeError(
                "StabilityCallback saw no loss: a Trainer whose training_step does not call the "
                "Trainer's own has to call observe_loss(loss) of the callback"
            )
        are_finite = torch.ones(())
        with self._missing.bearing("gradients"):
            are_finite = gradients_are_finite(model)
        value, share = mean_over_ranks(self.loss, are_finite)
        has_scaler = getattr(optimizer, "scaler", None) is not None
        self.alarms = self._run.judge_loss(step, value, share == 1, has_scaler=has_scaler)
        if self.records is not None:
            self._judge_records(step, value, self.records, model)
        self.suspicious = suspicious_steps(self.alarms, dict(self._run.recent.of_steps()))
        if self._loss_again is not None:
            with self._missing.bearing("sharpness"):
                self._values |= measure_loss_sharpness(self._loss_again, model, optimizer)

    def _judge_records(self, step: int, loss: float, records: Records, model: nn.Module) -> None:
        quantities = gather_records(records, model)
        self._values = {"loss": loss if math.isfinite(loss) else None, "quantities": quantities}
        with self._missing.bearing("signs of collapse"):
            self.alarms += self._run.judge_probe(step, quantities)

    def read_rates(self, model: nn.Module, optimizer: Any) -> None:
        """Read the rates of AdamW2 while its groups still have those of this step."""
        optimizer = inner_optimizer(optimizer)
        if isinstance(optimizer, AdamW2) and (self._values or self.records is not None):
            with self._missing.bearing("effective_lr"):
                rates, clipped = effective_rates(optimizer, model)
                self._values["effective_lr"] = rates
                self.pending["stability/clipped_share"] = clipped

    def publish(self, model: nn.Module, *, log_layers: bool) -> dict[str, Any]:
        """Put what was seen into `pending` and `short`; return the step's line for the file.

        Args:
            model: after the step.
            log_layers: whether the worst head of every layer is to be logged.
        """
        quantities = self._values.setdefault("quantities", {})
        with self._missing.bearing("gamma"):
            if found := gammas(model):
                quantities["gamma"] = found
        self.pending |= aggregate(quantities, layers=log_layers)
        if "effective_lr" in self._values:
            self.pending |= aggregate({"effective_lr": self._values["effective_lr"]})
        for name in SHARPNESS:
            if self._values.get(name) is not None:
                self.pending[f"stability/{name}"] = float(self._values[name])
        self.pending["stability/nonfinite_steps"] = float(self._run.nonfinite_steps)
        self.pending["stability/alarms"] = float(self._run.num_alarms)
        self.pending["stability/rollbacks"] = float(self._run.rollbacks.count)
        self.short = summarise(quantities, self._run.num_alarms)
        line = self._values | {"nonfinite_steps": self._run.nonfinite_steps}
        if missing := self._missing.reasons | (self.records or Records()).reasons():
            line["missing"] = missing
        return line

"""Whether AdamW2 leaves the weights room to grow in the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerState

from hf_stable._ranks import inner_optimizer
from hf_stable.adamw2.optimizer import AdamW2

__all__ = ["GrowthCheck"]

ENOUGH_GROWTH = 10.0
"""Times its size that a weight of a fresh layer, drawn from N(0, 0.02), often grows to."""


class GrowthCheck(TrainerCallback):
    """Says when training begins what tau AdamW2 has derived, or if tau leaves hardly any room."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Note who prints.

        Args:
            say: called with what there is to say.
        """
        self.say = say

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Compare the growth that tau allows over the steps with what a fresh layer needs."""
        optimizer = inner_optimizer(optimizer)
        if not isinstance(optimizer, AdamW2):
            return
        bound = [group for group in optimizer.param_groups if math.isfinite(group["tau"])]
        if not bound:
            return
        steps = state.max_steps - state.global_step
        highest = max(bound, key=lambda group: group["tau"])
        tau, planned = highest["tau"], highest["total_steps"]
        if planned:
            self.say(f"tau=auto is {tau:.4g}, for {planned:g} steps at the full rate")
        elif (growth := steps * math.log1p(tau)) < math.log(ENOUGH_GROWTH):
            self.say(
                f"in {steps} steps at tau={tau:g} a weight grows to {math.exp(growth):.3g} times "
                f"its size at most, and a fresh head often has to grow to {ENOUGH_GROWTH:g} times. "
                "Give tau=auto or a larger tau (optim_args), or train for longer"
            )

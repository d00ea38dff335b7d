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
    """Says when training begins if AdamW2's tau leaves the weights hardly room to grow."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Note who prints.

        Args:
            say: called with what there is to say.
        """
        self.say = say

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Compare steps times tau with what a fresh layer usually needs."""
        optimizer = inner_optimizer(optimizer)
        if not isinstance(optimizer, AdamW2):
            return
        taus = [group["tau"] for group in optimizer.param_groups if math.isfinite(group["tau"])]
        steps = state.max_steps - state.global_step
        if not taus or (growth := steps * math.log1p(max(taus))) >= math.log(ENOUGH_GROWTH):
            return
        self.say(
            f"tau={max(taus):g} over {steps} steps lets no weight grow beyond "
            f"{math.exp(growth):.2g} times its size, and a fresh head often has to grow "
            f"{ENOUGH_GROWTH:g} times. Give a larger tau (optim_args), or train for more steps"
        )

"""Schedules that are given a value for each group, over the groups that AdamW2 parts further."""

from __future__ import annotations

import inspect
from statistics import mean
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from hf_stable._ranks import inner_optimizer
from hf_stable.adamw2.model_optimizer import ModelAdamW2
from hf_stable.trainer.changes import wrapping

__all__ = ["steps_at_full_rate"]

_LOOKED_AT = 1000
"""Steps at which a schedule is looked at, for its mean."""

_PER_GROUP = {
    "LambdaLR": ("lr_lambda",),
    "MultiplicativeLR": ("lr_lambda",),
    "OneCycleLR": ("max_lr", "base_momentum", "max_momentum"),
    "CyclicLR": ("base_lr", "max_lr", "base_momentum", "max_momentum"),
    "ReduceLROnPlateau": ("min_lr",),
}
"""What a schedule of torch takes one value for each group of: the groups that its caller made."""


def steps_at_full_rate(args: TrainingArguments, steps: int) -> float:
    """Return the sum of a schedule over a run, in steps at its highest rate.

    A schedule that goes by what happens in the run, such as one that waits for a plateau, counts
    as constant.

    Args:
        args: that name the schedule.
        steps: of the run.
    """
    rate = args.learning_rate
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=rate)  # some schedules read its rate
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer=stand_in,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
    )
    factors = getattr(schedule, "lr_lambdas", None)
    if factors is None:
        return float(steps)
    count = min(steps, _LOOKED_AT)
    shares = (factors[0](int((index + 0.5) * steps / count)) for index in range(count))
    return max(1.0, steps * mean(shares))


def _spread(original: Any, *args: Any, **kwargs: Any) -> None:
    call = inspect.signature(original).bind(*args, **kwargs)
    optimizer = inner_optimizer(call.arguments["optimizer"])
    if isinstance(optimizer, ModelAdamW2):
        for name in _PER_GROUP[original.__qualname__.split(".")[0]]:
            values = call.arguments.get(name)
            if isinstance(values, list | tuple) and len(values) == optimizer.num_given_groups:
                call.arguments[name] = optimizer.per_group(values)
    original(*call.args, **call.kwargs)


for _class, _names in _PER_GROUP.items():
    wrapping(
        f"torch.optim.lr_scheduler:{_class}.__init__",
        "optimizer",
        *_names,
        reason='under optim="adamw2" takes a value for each group that the Trainer made',
    )(_spread)

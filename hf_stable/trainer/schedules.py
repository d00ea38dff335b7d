"""Schedules that are given a value for each group, over the groups that AdamW2 parts further."""

from __future__ import annotations

import inspect
from typing import Any

from hf_stable._ranks import inner_optimizer
from hf_stable.adamw2.model_optimizer import ModelAdamW2
from hf_stable.trainer.changes import wrapping

_PER_GROUP = {
    "LambdaLR": ("lr_lambda",),
    "MultiplicativeLR": ("lr_lambda",),
    "OneCycleLR": ("max_lr", "base_momentum", "max_momentum"),
    "CyclicLR": ("base_lr", "max_lr", "base_momentum", "max_momentum"),
    "ReduceLROnPlateau": ("min_lr",),
}
"""What a schedule of torch takes one value for each group of: the groups that its caller made."""


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

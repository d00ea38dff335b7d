"""A warning for an optimizer whose groups were made without their model, which has fused weights.

A weight does not say that it is query, key and value side by side: the model does. It is looked
for among the objects of the process, once.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hf_stable._live_objects import live_instances
from hf_stable._ranks import whole_shape
from hf_stable.adamw2.groups import parameter_rules
from hf_stable.measures.parts import Parts

__all__ = ["joined_projections", "look_at_first_step"]


def look_at_first_step(optimizer: Optimizer) -> None:
    """Warn at the first step of an optimizer if it takes fused projections for one matrix each."""

    def look(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        handle.remove()
        if _may_hold_fused(stepping.param_groups):
            _warn(stepping.param_groups)

    handle = optimizer.register_step_pre_hook(look)


def joined_projections(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> list[str]:
    """Return the names of a model's fused projections that groups take for one matrix each.

    Args:
        groups: of AdamW2.
        model: any.
    """
    joined = {
        id(param)
        for group in groups
        if not math.isinf(group["tau"]) and Parts.of(group["parts"]).is_whole
        for param in group["params"]
    }
    rules = parameter_rules(model) if joined else {}
    return [
        name
        for name, param in model.named_parameters()
        if id(param) in joined and "parts" in rules.get(id(param), {})
    ]


def _may_hold_fused(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether groups look as if nobody had parted them, and hold what may be fused.

    `part_groups` exempts biases and embeddings. Blocks have fused projections of one shape, which
    is not square.
    """
    if any(math.isinf(g["tau"]) or not Parts.of(g["parts"]).is_whole for g in groups):
        return False
    shapes = Counter(whole_shape(p) for g in groups for p in g["params"])
    return any(
        number > 1 and len(shape) == 2 and len(set(shape)) == 2 for shape, number in shapes.items()
    )


def _warn(groups: Sequence[Mapping[str, Any]]) -> None:
    owned = {id(param) for group in groups for param in group["params"]}
    for model in live_instances(PreTrainedModel):
        if owned.isdisjoint(map(id, model.parameters())):
            continue
        if names := joined_projections(groups, model):
            warnings.warn(
                f"AdamW2 takes {len(names)} fused projections of this {type(model).__name__} "
                f"(first: {names[0]!r}) for one matrix each, with one rate for all their parts: "
                "its parameters came without the model, which knows of query, key and value side "
                "by side. Give it hf_stable.parameter_groups(model), which also exempts biases and "
                "embeddings from the rule, or say parts=... in a group of your own",
                UserWarning,
                stacklevel=4,
            )
            return

"""A group of AdamW2 at a step: which of its weights take it, and which rates they got."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_stable._ranks import is_partitioned, placed_like
from hf_stable.adamw2.replaced_weights import refuse_flattened, refuse_resized
from hf_stable.adamw2.weights import Weight
from hf_stable.measures.parts import Parts

__all__ = ["given_shapes", "note_lr", "rates_of_group", "weights_of"]


def given_shapes(groups: Sequence[Mapping[str, Any]]) -> list[list[torch.Size]]:
    """Return the shapes of the parameters of groups, by which `weights_of` knows them again."""
    return [[param.shape for param in group["params"]] for group in groups]


def weights_of(
    group: dict[str, Any], shapes: Sequence[torch.Size], states: Mapping[Tensor, dict[str, Any]]
) -> list[Weight]:
    """Return the parameters of a group that have gradients.

    Args:
        group: of the optimizer.
        shapes: of its parameters as the optimizer was given them, from `given_shapes`.
        states: of all parameters, made where they are missing.

    Raises:
        RuntimeError: for a sparse gradient.
        ValueError: for parameters that were replaced by others, or have become of another shape.
    """
    params, weights, parts = group["params"], [], Parts.of(group["parts"])
    for index, param in enumerate(params):
        grad = param.grad
        if grad is None:
            continue
        if grad.is_sparse:
            raise RuntimeError("AdamW2 takes no sparse gradients: use torch.optim.SparseAdam")
        is_known = len(params) == len(shapes)
        if is_known and not is_partitioned(param):
            refuse_resized(param, shapes[index])
        same = is_known and param.shape == shapes[index]
        refuse_flattened(param, replaced=not same or is_partitioned(param))
        weights.append(Weight(param, placed_like(grad, param), states[param], group, parts))
    return weights


def note_lr(group: dict[str, Any]) -> None:
    """Keep the highest rate of the step that a group takes: a scheduler changes it afterwards."""
    lr = group["lr"]
    group["last_lr"] = lr.clone() if isinstance(lr, Tensor) else lr


def rates_of_group(
    group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]]
) -> dict[Any, float | list[float]]:
    """Return the rates that the parameters of a group got in their last step.

    Returns:
        As `AdamW2.effective_lr`.
    """
    rates: dict[Any, float | list[float]] = {}
    is_plain = math.isinf(group["tau"])
    names = group.get("param_names", group["params"])
    for name, param in zip(names, group["params"], strict=True):
        state = states.get(param, {})
        if "effective_lr" in state and not is_plain:
            values = state["effective_lr"].tolist()
            rates[name] = values if len(values) > 1 else values[0]
        elif state and is_plain and "last_lr" in group:
            rates[name] = float(group["last_lr"])
    return rates

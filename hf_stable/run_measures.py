"""What a monitor reads off a training run beside attention: gradients, rates, gammas, sharpness."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from hf_stable.adamw2 import AdamW2
from hf_stable.sharpness import adam_preconditioner, measure_sharpness, sharpness_threshold
from hf_stable.sigma_reparam import sigma_layers

__all__ = [
    "effective_rates",
    "gammas",
    "gradients_are_finite",
    "mean_over_ranks",
    "measure_loss_sharpness",
    "scale_rates",
    "value_of_first_rank",
]


@torch.no_grad()
def gradients_are_finite(model: nn.Module, *, everywhere: bool) -> Tensor:
    """Look for NaN and infinity in the gradients.

    Args:
        model: after its backward.
        everywhere: look at all of them. Otherwise only at biases and gains, a thousandth of the
            work: what is not finite in a backward reaches those of all layers below, and clipping
            by a norm that is NaN reaches all.

    Returns:
        (), 1 or 0, on the model's device.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    small = [p for p in parameters if p.ndim <= 1]
    chosen = parameters if everywhere or not small else small
    grads = [_local(p.grad) for p in chosen if p.grad is not None]
    if not grads:
        return torch.ones(())
    return get_total_norm(grads).isfinite().float()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mean_over_ranks(*values: Tensor) -> list[float]:
    """Return each number's mean over all processes, with one read from the device."""
    device = values[0].device
    joined = torch.stack([value.to(device, torch.float32).reshape(()) for value in values])
    if _num_ranks() > 1:
        dist.all_reduce(joined)
        joined /= _num_ranks()
    return joined.tolist()


def value_of_first_rank(value: Any) -> Any:
    """Return what the first process holds, on every process."""
    if _num_ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gammas(model: nn.Module) -> dict[str, list[float]]:
    """Return the gammas of each sigma layer, by name."""
    found = {}
    for name, layer in sigma_layers(model):
        gamma = layer.gamma.detach()
        found[name] = (gamma.full_tensor() if isinstance(gamma, DTensor) else gamma).tolist()
    return found


def effective_rates(
    optimizer: AdamW2, model: nn.Module
) -> tuple[dict[str, float | list[float]], float]:
    """Return the rate of each weight in the last step, and the share of clipped matrices.

    Args:
        optimizer: after at least one step.
        model: gives the names where the optimizer has none.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {
        key if isinstance(key, str) else names.get(key, "unnamed"): rate
        for key, rate in optimizer.effective_lr().items()
    }
    highest = {}
    for group in optimizer.param_groups:
        for key, parameter in zip(
            group.get("param_names", group["params"]), group["params"], strict=True
        ):
            if parameter.ndim > 1 and not math.isinf(group["tau"]):
                name = key if isinstance(key, str) else names.get(parameter, "unnamed")
                highest[name] = float(group["lr"])
    blocks = [
        rate < (1 - 1e-6) * top
        for name, top in highest.items()
        if name in rates
        for rate in _as_list(rates[name])
    ]
    return rates, sum(blocks) / len(blocks) if blocks else 0.0


def _as_list(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]


def scale_rates(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply every learning rate by a factor, now and for the rest of the schedule."""
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if isinstance(group.get(name), Tensor):
                group[name].mul_(factor)
            elif name in group:
                group[name] *= factor
    for name in ("base_lrs", "_last_lr"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])


def measure_loss_sharpness(
    model: nn.Module, inputs: tuple[Any, dict[str, Any]], optimizer: Any
) -> dict[str, float | None]:
    """Measure the sharpness of the loss on a batch, preconditioned as the optimizer does.

    Args:
        model: its forward returns the loss.
        inputs: positional and named arguments of the forward.
        optimizer: of the Adam family the preconditioned Hessian is taken, once it has stepped.

    Returns:
        `sharpness` and `sharpness_threshold`, above which the loss goes up; None if not finite.

    Raises:
        ValueError: if the model computes no loss from these inputs.
    """
    args, kwargs = inputs

    def loss() -> Tensor:
        value = getattr(model(*args, **kwargs), "loss", None)
        if value is None:
            raise ValueError(
                f"sharpness_every needs a model that returns its loss; {type(model).__name__} got "
                f"{sorted(kwargs)} and returned none. Leave sharpness_every out"
            )
        return value

    optimizer = getattr(optimizer, "optimizer", optimizer)
    params = [p for p in model.parameters() if p.requires_grad]
    group = optimizer.param_groups[0]
    stepped = all("exp_avg_sq" in optimizer.state.get(p, {}) for p in params)
    diagonal = adam_preconditioner(optimizer, params) if stepped else None
    value = measure_sharpness(loss, params, preconditioner=diagonal).value
    beta1 = float(group["betas"][0]) if stepped else None
    rate = float(group["lr"])
    return {
        "sharpness": value if math.isfinite(value) else None,
        "sharpness_threshold": sharpness_threshold(rate, beta1) if rate else None,
    }

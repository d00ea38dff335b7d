"""What a monitor reads off a training run beside attention: gradients, rates, gammas, sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from hf_stable._ranks import inner_optimizer, local_tensor, whole_tensor
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.architectures.paths import state_dict_name
from hf_stable.measures.sharpness import adam_preconditioner, measure_sharpness, sharpness_threshold
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.monitor.advice import Remedy

__all__ = [
    "check_sharpness_can_be_measured",
    "effective_rates",
    "gammas",
    "gradients_are_finite",
    "measure_loss_sharpness",
    "remedies_in_place",
    "scale_rates",
]


@torch.no_grad()
def gradients_are_finite(model: nn.Module) -> Tensor:
    """Look for NaN and infinity in all gradients, by their norm.

    A single infinity may hide in one weight: where the Trainer clips by a norm that is infinite,
    all other gradients become zero. One pass over the gradients, beside an optimizer's seven:
    on a CPU 0.2 % of a step of a GPT-2 with 12 layers of width 256, 0.9 % of a ViT's at batch 2.

    Args:
        model: after its backward.

    Returns:
        (), 1 or 0, on the model's device.
    """
    grads = [local_tensor(p.grad) for p in model.parameters() if p.grad is not None]
    return get_total_norm(grads).isfinite().float() if grads else torch.ones(())


def gammas(model: nn.Module) -> dict[str, list[float]]:
    """Return the gammas of each sigma layer, by name.

    Raises:
        ValueError: if they are partitioned (DeepSpeed ZeRO-3).
    """
    found = {}
    for name, layer in sigma_layers(model):
        if layer.gamma.numel() == 0:
            raise ValueError(
                "gammas are partitioned; a stage3_param_persistence_threshold of their number, or "
                "of DeepSpeed's 100000, leaves them whole"
            )
        found[name] = whole_tensor(layer.gamma.detach()).tolist()
    return found


def effective_rates(
    optimizer: AdamW2, model: nn.Module
) -> tuple[dict[str, float | list[float]], float]:
    """Return the rate of each weight in the last step, and the share of clipped matrices.

    Args:
        optimizer: after at least one step.
        model: gives the names where the optimizer has none.
    """
    names = {parameter: state_dict_name(name) for name, parameter in model.named_parameters()}
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


def remedies_in_place(model: nn.Module, optimizer: Any) -> tuple[Remedy, ...]:
    """Return which of the package's own remedies a run has, by its model and optimizer."""
    found: list[Remedy] = []
    if sigma_layers(model):
        found.append("sigma_reparam")
    if isinstance(inner_optimizer(optimizer), AdamW2):
        found.append("adamw2")
    return tuple(found)


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


def check_sharpness_can_be_measured(args: Any, model: nn.Module) -> None:
    """Raise ValueError where sharpness has no meaning: parameters that are cut up or not kept."""
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if sharded or getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise ValueError(
            "sharpness_every needs whole parameters, and FSDP and DeepSpeed shard them: leave it "
            "out, or measure an unsharded copy with hf_stable.measures.sharpness.measure_sharpness"
        )


def measure_loss_sharpness(
    loss_fn: Callable[[], Tensor], model: nn.Module, optimizer: Any
) -> dict[str, Any]:
    """Measure the sharpness of the loss on a batch, preconditioned as the optimizer does.

    Of an optimizer of the Adam family that has stepped, the preconditioned Hessian is taken, with
    respect to the parameters that it has a second moment for: one that never got a gradient has
    none, and plays no part in the loss. Gradient checkpointing is off meanwhile: here it saves no
    memory, since the graph of the gradients keeps the activations.

    Args:
        loss_fn: computes the loss by `model`.
        model: whose trainable parameters are meant.
        optimizer: the one that trains them, as it is or in accelerate's wrapper.

    Returns:
        `sharpness` and `sharpness_threshold`, above which the loss goes up; None if not finite.
        `sharpness_preconditioned`: whether they are of Adam's preconditioned Hessian.
    """
    optimizer = inner_optimizer(optimizer)
    group = optimizer.param_groups[0]
    params = [p for p in model.parameters() if p.requires_grad]
    stepped = [p for p in params if "exp_avg_sq" in optimizer.state.get(p, {})]
    preconditioned = "betas" in group and bool(stepped)
    diagonal = adam_preconditioner(optimizer, stepped) if preconditioned else None
    with _uncheckpointed(model), torch.compiler.set_stance("force_eager"):
        found = measure_sharpness(
            loss_fn, stepped if preconditioned else params, preconditioner=diagonal
        )
    beta1 = float(group["betas"][0]) if preconditioned else None
    rate = float(group["lr"])
    return {
        "sharpness": found.value if math.isfinite(found.value) else None,
        "sharpness_threshold": sharpness_threshold(rate, beta1) if rate else None,
        "sharpness_preconditioned": preconditioned,
    }


@contextmanager
def _uncheckpointed(model: nn.Module) -> Iterator[None]:
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]  # a plain attribute
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]

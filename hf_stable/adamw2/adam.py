"""The step of plain AdamW on what is given, by torch's fused kernel, for weights of any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_stable._ranks import local_tensor
from hf_stable.adamw2.weights import MOMENTS, Weight
from hf_stable.kernels.weights import PLAIN
from hf_stable.measures.flat_ranges import FlatRange

__all__ = ["Held", "adam_step", "local_entries", "rate_beside"]

Held = Tensor | FlatRange
"""A weight, or a tensor laid out like it, wherever its entries are."""


def adam_step(
    weights: list[Weight], targets: Sequence[Held], *, lr: float | Tensor, weight_decay: float
) -> None:
    """Move the moments and take a plain AdamW step on `targets`, in place.

    On targets of zeros, without decay, this leaves `-lr * U_t` there in one pass over gradient
    and moments. To be called where gradients are disabled.

    Args:
        weights: weights of one group.
        targets: what to step, one for each weight and laid out like it.
        lr: rate of the step.
        weight_decay: decoupled decay of the targets.
    """
    group = weights[0].group
    _count_steps([weight.state["step"] for weight in weights])
    calls: defaultdict[Any, list[tuple[Tensor, ...]]] = defaultdict(list)
    relaid = []
    for weight, target in zip(weights, targets, strict=True):
        first, second = (weight.state[key] for key in MOMENTS)
        grad, entries = weight.grad, target
        if isinstance(entries, FlatRange) or type(entries) not in PLAIN:
            first, second, grad = map(local_tensor, (first, second, grad))
            entries = local_entries(entries)
        # The fused kernel walks all tensors of a weight in the order of their memory.
        if grad.stride() != first.stride():
            grad = torch.empty_like(first).copy_(grad)
        if entries.stride() != first.stride():
            relaid.append((entries, torch.empty_like(first).copy_(entries)))
            entries = relaid[-1][1]
        tensors = (entries, grad, first, second, weight.state["step"])
        calls[entries.device, entries.dtype].append(tensors)
    for (device, _), call in calls.items():
        params, grads, firsts, seconds, steps = map(list, zip(*call, strict=True))
        torch._fused_adamw_(
            params, grads, firsts, seconds, [], steps,
            lr=rate_beside(lr, device),
            beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
            weight_decay=weight_decay, amsgrad=False, maximize=group["maximize"],
        )  # fmt: skip
    for entries, copy in relaid:
        entries.copy_(copy)


def _count_steps(steps: list[Tensor]) -> None:
    """Add one to each, in place."""
    if steps[0].is_cpu:
        # A number would become a tensor again for each of them.
        torch._foreach_add_(steps, torch.ones((), device="cpu"), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1.0)


def rate_beside(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """Return a rate that kernels on a device can take, without waiting for it.

    A tensor on the CPU becomes a number for any other device, as in torch's own fused kernels: a
    copy would wait, and cannot be captured in a CUDA graph.
    """
    if not isinstance(lr, Tensor):
        return lr
    return float(lr) if lr.is_cpu and device.type != "cpu" else lr.to(device)


def local_entries(held: Held) -> Tensor:
    """Return the entries of a weight, or of what is laid out like it, that this process holds."""
    return (held.local if isinstance(held, FlatRange) else local_tensor(held)).detach()

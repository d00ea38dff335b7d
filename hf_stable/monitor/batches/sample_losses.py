"""The loss of each sample of a micro-batch, computed so that the run does not notice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["count_samples", "losses_of_samples", "why_not_by_sample"]

LossOf = Callable[[Mapping[str, Any]], Tensor]


def count_samples(inputs: Mapping[str, Any]) -> int | None:
    """Return how many samples inputs hold, by the first tensor's first dimension; None if none."""
    return next((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim), None)


def why_not_by_sample(model: nn.Module) -> str:
    """Return why samples cannot be measured one by one, or ""."""
    if any(isinstance(p, DTensor) or not p.numel() for p in model.parameters()):
        return "weights are sharded: all processes would have to compute as many samples"
    return ""


def losses_of_samples(inputs: Mapping[str, Any], loss_of: LossOf, model: nn.Module) -> list[float]:
    """Return the loss of each sample, with the weights as they are, dropout off.

    Gradients, buffers, the mode of each module and all random numbers are as before afterwards. A
    model of tokens takes the mean over the sample's tokens.

    Args:
        inputs: of a micro-batch; tensors and lists as long as it has samples are cut.
        loss_of: computes the loss of inputs.
        model: that it computes it with.

    Raises:
        ValueError: if there is no tensor to count samples by.
        Exception: that the model raises on a single sample.
    """
    count = count_samples(inputs)
    if count is None:
        raise ValueError("the inputs hold no tensor with samples")
    with _leaving_no_trace(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        losses = [loss_of(_sample(inputs, i, count)).detach().float() for i in range(count)]
        return torch.stack([loss.reshape(()) for loss in losses]).tolist()


def _sample(inputs: Mapping[str, Any], number: int, count: int) -> dict[str, Any]:
    def cut(value: Any) -> Any:
        has_samples = isinstance(value, Tensor) and value.ndim or isinstance(value, list)
        return value[number : number + 1] if has_samples and len(value) == count else value

    return {key: cut(value) for key, value in inputs.items()}


@contextmanager
def _leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, and put back what a forward may have changed."""
    import numpy as np  # which transformers needs, and no other file of this folder

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [device] if device.type not in ("cpu", "meta", "mps") else []
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    others = random.getstate(), np.random.get_state()
    # Without devices the type does not matter, and must be one that torch knows.
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
            random.setstate(others[0])
            np.random.set_state(others[1])

"""AdamW2's step and sigma's refresh in plain torch, for any device, dtype and layout.

The kernels are tested against it, in float64, and leave to it the layouts that they cannot follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_stable.kernels.tables import TURNED
from hf_stable.kernels.weights import RuledWeight, TrackedWeight
from hf_stable.measures.matrices import (
    MatrixShard,
    matrices_of,
    shapes_of,
    spectral_dtype,
    spread_values,
)
from hf_stable.measures.power_iteration import SingularTriple, power_step

__all__ = ["refresh_layers", "step_weight", "takes"]


def takes(weight: RuledWeight) -> bool:
    """Say whether `step_weight` can step a weight: any whole one that is not new to Rule 1."""
    return (
        type(weight.param) in (Tensor, nn.Parameter)
        and weight.param.layout is torch.strided
        and not weight.param.is_meta
        and "exempt" in weight.state
    )


@torch.no_grad()
def step_weight(weight: RuledWeight) -> None:
    """Take AdamW2's step for a weight, in place; comments name lines of Algorithm 1.

    Nothing is read back to the host. A NaN stays a NaN: an update of unknown size must not pass as
    a small one.

    Args:
        weight: one that `takes` says yes to, with its state prepared.
    """
    param, state, group = weight.param, weight.state, weight.group
    # Lines 3 to 5.
    update = _move_moments(weight)
    # Line 6. Paper: prints sigma1 of the last update; its Eq. 6 has that of W_{t-1}, as here.
    count = group["power_iterations"]
    sigma = _iterate(weight, param, state["weight_v"], count, again_if_turned=False)
    sigma_update = _iterate(weight, update, state["update_v"], count, again_if_turned=True)
    # Lines 7 to 9.
    bound = group["tau"] * sigma / sigma_update
    bound = torch.where(state["exempt"] | (sigma_update == 0), math.inf, bound)
    lr = torch.as_tensor(group["lr"], dtype=bound.dtype, device=bound.device).reshape(())
    rates = state["effective_lr"].copy_(torch.where(bound >= lr, lr, bound))
    # Lines 10 to 14.
    rate = spread_values(rates, param, weight.parts)
    param.copy_(param.to(update.dtype) * (1 - rate * group["weight_decay"]) - rate * update)


def _move_moments(weight: RuledWeight) -> Tensor:
    """Move the moments and return Adam's update, in the dtype of spectra."""
    state, group = weight.state, weight.group
    beta1, beta2 = group["betas"]
    real = spectral_dtype(weight.param.dtype)
    state["step"] += 1
    step = state["step"].double()
    grad = weight.grad.detach().to(real) * (-1 if group["maximize"] else 1)
    first = state["exp_avg"].to(real).lerp(grad, 1 - beta1)
    second = (state["exp_avg_sq"].to(real) * beta2).addcmul(grad, grad, value=1 - beta2)
    state["exp_avg"].copy_(first)
    state["exp_avg_sq"].copy_(second)
    root = second.sqrt() * (1 - beta2**step).rsqrt().to(real) + group["eps"]
    return first * (1 / (1 - beta1**step)).to(real) / root


def _iterate(
    weight: RuledWeight, tensor: Tensor, stored: Tensor, count: int, *, again_if_turned: bool
) -> Tensor:
    """Move the stored vectors of a weight's parts by power iterations; return sigma of each, (k,).

    Args:
        weight: whose parts they are.
        tensor: the weight or its update.
        stored: (k, n) right vectors.
        count: how many iterations.
        again_if_turned: whether a vector that the last of them has turned gets one more.
    """
    matrices = matrices_of(tensor.reshape(1) if tensor.ndim == 0 else tensor, weight.parts)
    shapes = shapes_of(tensor.shape, weight.parts)
    vectors = [row[:width] for row, (_, width) in zip(stored, shapes, strict=True)]
    for _ in range(count):
        before, triples = vectors, power_step(matrices, None, vectors)
        vectors = [triple.v for triple in triples]
    if again_if_turned:
        more = power_step(matrices, None, vectors)
        for index, (old, triple, further) in enumerate(zip(before, triples, more, strict=True)):
            turned = torch.dot(old, triple.v) < TURNED
            pairs = zip(triple, further, strict=True)
            triples[index] = SingularTriple(*(torch.where(turned, b, a) for a, b in pairs))
    for row, triple in zip(stored, triples, strict=True):
        row[: len(triple.v)] = triple.v
    return torch.stack([triple.sigma for triple in triples])


@torch.no_grad()
def refresh_layers(layers: Sequence[TrackedWeight], keep: Tensor | None) -> None:
    """Move the triples of layers by power iterations, in place; also those of sharded weights.

    Args:
        layers: the same and in the same order on every rank of a sharded weight.
        keep: where this tensor of one element is not zero, everything stays as it is.
    """
    matrices: list[Tensor | MatrixShard] = []
    counts: list[int] = []
    sigmas: list[Tensor] = []
    us: list[Tensor] = []
    vs: list[Tensor] = []
    for layer in layers:
        matrices += matrices_of(layer.weight, layer.parts)
        counts += [layer.power_iterations] * len(layer.sigma)
        sigmas += layer.sigma.unbind()
        shapes = shapes_of(layer.weight.shape, layer.parts)
        us += [u[:height] for u, (height, _) in zip(layer.sigma_u, shapes, strict=True)]
        vs += [v[:width] for v, (_, width) in zip(layer.sigma_v, shapes, strict=True)]
    near_us, near_vs = us, vs
    if any(layer.weight.device != layer.sigma.device for layer in layers):
        # FSDP2's CPUOffloadPolicy has the shards on the CPU between passes, but not the buffers.
        shards = [each.local if isinstance(each, MatrixShard) else each for each in matrices]
        near_us = [u.to(shard.device) for u, shard in zip(us, shards, strict=True)]
        near_vs = [v.to(shard.device) for v, shard in zip(vs, shards, strict=True)]
    triples = power_step(matrices, near_us, near_vs)
    for done in range(1, max(counts)):
        more = [index for index, count in enumerate(counts) if count > done]
        further = power_step(
            [matrices[i] for i in more], [triples[i].u for i in more], [triples[i].v for i in more]
        )
        for index, triple in zip(more, further, strict=True):
            triples[index] = triple
    for old, moved in zip((sigmas, us, vs), zip(*triples, strict=True), strict=True):
        new = [n.to(o.device) for o, n in zip(old, moved, strict=True)]
        if keep is not None:  # its device may be another's, where a model lies on several
            new = [torch.where(keep.to(o.device) != 0, o, n) for o, n in zip(old, new, strict=True)]
        torch._foreach_copy_(old, new)

"""The update of AdamW2: Adam's step, Rule 1 and the move, for weights of any layout.

Pure functions on weights and their state; the optimizer around them is in `optimizer`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_stable.adamw2.adam import Held, adam_step, local_entries, rate_beside
from hf_stable.adamw2.weights import Weight
from hf_stable.kernels.choosing import Workspaces, step_by_kernels
from hf_stable.measures.flat_ranges import FlatRange
from hf_stable.measures.matrices import (
    MatrixShard,
    spectral_dtype,
    spread_values,
)
from hf_stable.measures.power_iteration import power_step

__all__ = [
    "COLD_ITERATIONS",
    "at_most",
    "move",
    "target_scale",
    "update",
]

COLD_ITERATIONS = 10
"""Power iterations at the first step of a weight, whose vectors start from nothing."""

CPU_BATCH_NUMEL = 1 << 18
"""On a CPU, weights of one shape are updated together up to this many entries.

Small weights share the cost of each call; a large one is alone, so that its update is still in
the cache when it is applied.
"""

GPU_BATCH_NUMEL = 1 << 26
"""The same elsewhere, where launches count: 256 MB of float32 working memory a batch."""


def at_most(bound: Tensor, lr: float | Tensor) -> Tensor:
    """Return `min(lr, bound)`, a NaN where the bound is one."""
    lr = rate_beside(lr, bound.device)
    return bound.clamp(max=lr.to(bound).reshape(()) if isinstance(lr, Tensor) else lr)


def update(weights: list[Weight], workspaces: Workspaces) -> None:
    """Step weights under Rule 1, in place: by kernels, and by torch what they do not take.

    Those are the weights that are new to the rule, sharded ones, and what is not contiguous in
    memory. Working memory of torch: a copy of the largest batch (three on a GPU, whose power
    iterations stack weights and updates), and of the local rows of all sharded weights.

    Args:
        weights: with their state prepared.
        workspaces: what the kernels keep from step to step.
    """
    flat = [weight for weight in weights if isinstance(weight.param, FlatRange)]
    whole = [weight for weight in weights if not isinstance(weight.param, FlatRange)]
    work = list(_batches(step_by_kernels(whole, workspaces) + flat))
    sizes: defaultdict[Any, int] = defaultdict(int)
    for (first, *others), *_ in work:
        if not first.is_spread:
            key, numel = (first.param.device, first.param.dtype), first.param.numel()
            sizes[key] = max(sizes[key], numel * (1 + len(others)))
    workspace = {key: torch.empty(size, device=key[0], dtype=key[1]) for key, size in sizes.items()}
    for together in work:
        _step_batch(together, workspace)


def _batches(weights: list[Weight]) -> Iterator[list[list[Weight]]]:
    """Yield the weights that take their steps together, apart by group.

    Sharded weights of a process group go together whatever their group, so that they share their
    collectives. Others go by shape, up to `CPU_BATCH_NUMEL` or `GPU_BATCH_NUMEL` entries.
    """
    sharded: defaultdict[Any, dict[Any, list[Weight]]] = defaultdict(dict)
    whole: dict[Any, list[Weight]] = {}
    for weight in weights:
        param = weight.param
        first = weight.matrices(param)[0] if weight.is_spread else None
        if isinstance(first, MatrixShard):
            sharded[first.groups].setdefault((id(weight.group), param.dtype), []).append(weight)
            continue
        key = (id(weight.group), type(param), param.shape, param.dtype, param.device)
        together = whole.setdefault(key, [])
        together.append(weight)
        most = CPU_BATCH_NUMEL if param.device.type == "cpu" else GPU_BATCH_NUMEL
        if (len(together) + 1) * param.numel() > most:
            yield [whole.pop(key)]
    for together in whole.values():
        yield [together]
    for groups in sharded.values():
        yield list(groups.values())


def _step_batch(together: list[list[Weight]], workspace: dict[Any, Tensor]) -> None:
    """Step weights that share their power iterations; comments name lines of Algorithm 1."""
    # Lines 3 to 5: the moments, and targets that are multiples of -U_t.
    targets = []
    for weights in together:
        targets.append(_zero_targets(weights, workspace))
        adam_step(weights, targets[-1], lr=target_scale(weights[0]), weight_decay=0.0)
    # Line 6. Paper: prints sigma1 of the last update; its Eq. 6 has that of W_{t-1}, as here.
    sigma_weights, sigma_targets = _spectral_norms(together, targets)
    for weights, own_targets, sigma_weight, sigma_target in zip(
        together, targets, sigma_weights, sigma_targets, strict=True
    ):
        # Lines 7 to 9: one rate for each matrix.
        rates = _clip_rates(weights, sigma_weight, sigma_target / target_scale(weights[0]))
        # Lines 10 to 14.
        move(weights, own_targets, rates)


def _zero_targets(weights: list[Weight], workspace: dict[Any, Tensor]) -> list[Held]:
    """Return zeros laid out like the moments of each weight, in the workspace unless sharded."""
    if weights[0].is_spread:
        return [
            replace(param, local=torch.zeros_like(param.local))
            if isinstance(param, FlatRange)
            else torch.zeros_like(param)
            for param in (weight.param for weight in weights)
        ]
    layouts = [weight.state["exp_avg"] for weight in weights]
    space = workspace[layouts[0].device, layouts[0].dtype]
    size = layouts[0].numel()
    space[: size * len(layouts)].zero_()
    return [
        space.as_strided(layout.shape, layout.stride(), size * i)
        for i, layout in enumerate(layouts)
    ]


def target_scale(weight: Weight) -> float:
    """Return what -U is multiplied by in a target: 1 / weight_decay where that is safe.

    `W - rate * U - rate * decay * W` lies at `rate * decay` on the way from W to `-U / decay`, so
    that step and decay are one pass over W. A vanishing decay would drown W in the rounding of
    that far point; half precision would overflow, and is stepped in float32 anyway.
    """
    decay, dtype = weight.group["weight_decay"], weight.param.dtype
    return 1.0 / decay if decay >= 1e-6 and dtype == spectral_dtype(dtype) else 1.0


def _spectral_norms(
    together: list[list[Weight]], targets: list[list[Held]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Move the power vectors; return sigma1 of all matrices, of weights and of targets."""
    weights = [weight for part in together for weight in part]
    own: list[Tensor | MatrixShard] = []
    theirs: list[Tensor | MatrixShard] = []
    for weight, target in zip(weights, [t for part in targets for t in part], strict=True):
        own += weight.matrices(weight.param)
        theirs += weight.matrices(target)
    stored = [v for key in ("weight_v", "update_v") for w in weights for v in w.vectors(key)]
    steady = max(part[0].group["power_iterations"] for part in together)
    cold = any("exempt" not in weight.state for weight in weights)
    together_count = max(steady, COLD_ITERATIONS) if cold else steady
    triples = power_step(own + theirs, None, stored)
    for _ in range(together_count - 1):
        triples = power_step(own + theirs, None, [triple.v for triple in triples])
    # Rule 1 keeps W from turning fast; nothing keeps U, so it gets one iteration more.
    triples[len(own) :] = power_step(theirs, None, [triple.v for triple in triples[len(own) :]])
    torch._foreach_copy_(stored, [triple.v for triple in triples])
    sigmas = iter([triple.sigma for triple in triples])
    counts = [sum(weight.num_parts for weight in part) for part in together]
    stacks = [torch.stack([next(sigmas) for _ in range(count)]) for count in counts * 2]
    return stacks[: len(together)], stacks[len(together) :]


def _clip_rates(weights: list[Weight], sigma_weight: Tensor, sigma_update: Tensor) -> Tensor:
    """Return `min(lr, tau * sigma1(W) / sigma1(U))` (Eq. 6) for every matrix, and store it.

    A NaN stays a NaN: an update of unknown size must not pass as a small one.
    """
    group = weights[0].group
    if any("exempt" not in weight.state for weight in weights):
        highest = at_most(torch.full_like(sigma_update, math.inf), group["lr"])
        _decide_exempt(weights, sigma_weight, highest * sigma_update)
    exempt = torch.cat([weight.state["exempt"] for weight in weights])
    bound = group["tau"] * sigma_weight / sigma_update
    bound = torch.where(exempt | (sigma_update == 0), math.inf, bound)
    rates = at_most(bound, group["lr"])
    torch._foreach_copy_(
        [weight.state["effective_lr"] for weight in weights],
        list(rates.split([weight.num_parts for weight in weights])),
    )
    return rates


def _decide_exempt(weights: list[Weight], sigma_weight: Tensor, sigma_step: Tensor) -> None:
    """Decide for weights that are new to the rule whether it leaves them alone, for good.

    Args:
        weights: of one group.
        sigma_weight: sigma1 of every matrix of theirs.
        sigma_step: the same of what AdamW would add.
    """
    counts = [weight.num_parts for weight in weights]
    sizes, steps = (sigma.split(counts) for sigma in (sigma_weight, sigma_step))
    for weight, size, step in zip(weights, sizes, steps, strict=True):
        if "exempt" in weight.state:
            continue
        # Moments that are older than the rule come from AdamW and do not say what started at
        # zero: what one step would outweigh has only begun.
        begun = (weight.state["step"] > 1) & (size <= step)
        weight.state["exempt"] = (size == 0) | begun
        weight.state["effective_lr"] = torch.zeros_like(size)


def move(weights: list[Weight], targets: Sequence[Held], rates: Tensor) -> None:
    """Step the matrices of weights of one group towards their targets, in place."""
    decay = weights[0].group["weight_decay"]
    owned = [local_entries(weight.param) for weight in weights]
    towards = [local_entries(target) for target in targets]
    by_weight = rates.split([weight.num_parts for weight in weights])
    if target_scale(weights[0]) != 1.0 and weights[0].parts.is_whole:
        torch._foreach_lerp_(owned, towards, list((rates * decay).unbind()))
        return
    for weight, own, target, own_rates in zip(weights, owned, towards, by_weight, strict=True):
        rate = spread_values(own_rates, weight.param, weight.parts)
        if target_scale(weight) != 1.0:
            own.lerp_(target, rate * decay)
            continue
        moved = own.to(rate.dtype)
        moved.mul_(1 - rate * decay).addcmul_(target.to(rate.dtype), rate)
        if moved is not own:
            own.copy_(moved)

"""Weights of many layouts for tests of kernels."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

from hf_stable.kernels.layouts import lay_out
from hf_stable.measures.parts import Parts


@dataclass
class Weight:
    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor]
    group: dict[str, Any]
    parts: Parts


CASES = {
    "tall": ((300, 257), Parts()),
    "small": ((40, 36), Parts()),
    "vector": ((7,), Parts()),
    "long vector": ((70000,), Parts()),
    "scalar": ((), Parts()),
    "row": ((1, 9), Parts()),
    "column": ((9, 1), Parts()),
    "kernel": ((6, 3, 2, 2), Parts()),
    "fused rows": ((96, 64), Parts((1, 1, 1))),
    "fused columns": ((64, 96), Parts((1, 1, 1), dim=1)),
    "unequal rows": ((60, 33), Parts((4, 1, 1))),
    "unequal columns": ((33, 600), Parts((4, 1, 1), dim=1)),
    "interleaved rows": ((48, 40), Parts((1, 1, 1), repeats=4)),
    "experts": ((5, 12, 8), Parts(stacked=True)),
    "fused experts": ((4, 24, 33), Parts((1, 2), dim=1, stacked=True)),
    "large fused rows": ((384, 300), Parts((1, 1, 1))),
    "large fused columns": ((300, 384), Parts((1, 1, 1), dim=1)),
}
"""Shape and parts of weights; the large ones are more than one chunk, and iterated on ahead."""

GROUP = dict(
    lr=1e-3,
    betas=(0.9, 0.99),
    eps=1e-8,
    weight_decay=0.1,
    tau=0.004,
    power_iterations=1,
    maximize=False,
    lora_scale=None,
)


def random_case(seed):
    """Return shape and parts of a weight of any kind."""
    rng = random.Random(seed)
    kind = rng.choice(["vector", "matrix", "rows", "columns", "stack", "kernel"])
    shares = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 4)))
    repeats = rng.randint(1, 5) if kind != "columns" else 1
    long, short = rng.randint(1, 9) * repeats * sum(shares), rng.randint(1, 140)
    if kind == "vector":
        return (rng.randint(1, 300),), Parts()
    if kind == "matrix":
        return (rng.randint(1, 300), rng.randint(1, 300)), Parts()
    if kind == "kernel":
        return tuple(rng.randint(1, 9) for _ in range(rng.randint(3, 5))), Parts()
    if kind == "rows":
        return (long, short), Parts(shares, repeats=repeats)
    if kind == "columns":
        return (short, long), Parts(shares, dim=1)
    dim = rng.randint(0, 1)
    parts = Parts(shares, repeats=1, dim=dim, stacked=True)
    length = rng.randint(1, 9) * sum(shares)
    matrix = (length, short) if dim == 0 else (short, length)
    return (rng.randint(1, 5), *matrix), parts


def make_weight(case, dtype, generator, **options):
    """Return a weight of a case, as it is after its first step under Rule 1, without a gradient."""
    shape, parts = case

    def draw(*size):
        return torch.randn(size, generator=generator)

    param = (draw(*shape) * 0.05).to(dtype)
    layout = lay_out(param.shape, parts)
    count, real = len(layout.shapes), torch.promote_types(dtype, torch.float32)

    def vectors():
        rows = torch.zeros(count, layout.most_columns, dtype=real)
        for row, (_, columns) in zip(rows, layout.shapes, strict=True):
            row[:columns] = normalize(
                draw(columns).abs() if layout.is_vector else draw(columns), dim=0
            )
        return rows

    state = dict(
        step=torch.zeros(()),
        exp_avg=torch.zeros_like(param),
        exp_avg_sq=torch.zeros_like(param),
        exempt=torch.zeros(count, dtype=torch.bool),
        effective_lr=torch.zeros(count, dtype=real),
        weight_v=vectors(),
        update_v=vectors(),
    )
    return Weight(param, torch.zeros_like(param), state, GROUP | options, parts)


def set_gradients(weights, generator):
    for weight in weights:
        drawn = torch.randn(weight.param.shape, generator=generator)
        weight.grad = drawn.to(weight.param)


def copy_weight(weight, dtype=None, device=None):
    """Return an independent copy, in another dtype or on another device if one is given."""
    dtypes = {
        key: dtype for key in ("exp_avg", "exp_avg_sq", "effective_lr", "weight_v", "update_v")
    }
    state = {
        key: value.to(device or value.device, dtypes.get(key) or value.dtype, copy=True)
        for key, value in weight.state.items()
    }
    param = weight.param.to(device or weight.param.device, dtype or weight.param.dtype, copy=True)
    return Weight(param, weight.grad.to(param.device), state, weight.group, weight.parts)


def same(first, second):
    """Say whether two weights and their states agree bit for bit."""
    pairs = [(first.param, second.param), *((first.state[k], second.state[k]) for k in first.state)]
    return all(torch.equal(a, b) for a, b in pairs)


def errors(weight, truth):
    """Return the largest difference of each tensor, as a share of the largest entry."""
    pairs = {key: (value, truth.state[key]) for key, value in weight.state.items()}
    pairs["param"] = weight.param, truth.param
    del pairs["exempt"]
    return {
        key: (
            (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)
        ).item()
        for key, (a, b) in pairs.items()
    }


def views(weight, tensor):
    """Return views of the parts of a tensor that is laid out like the weight."""
    parts = weight.parts
    matrix = tensor if parts.stacked else tensor.view(len(tensor) if tensor.ndim else 1, -1)
    return parts.views(matrix)

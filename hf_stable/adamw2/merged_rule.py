"""Rule 1 for LoRA's merged weight, which is never formed.

Pure functions like those of `rule`, for groups of AdamW2 that set `lora_scale`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_stable.adamw2.adam import adam_step
from hf_stable.adamw2.rule import COLD_ITERATIONS, at_most, move, target_scale
from hf_stable.adamw2.weights import LORA_STATE, RULE_STATE, Weight
from hf_stable.measures.matrices import as_matrix, spectral_dtype
from hf_stable.measures.parts import Parts
from hf_stable.measures.power_iteration import generic_vector, step_batch

__all__ = ["Adapter", "check_factors", "pair_factors", "update_adapters"]

CHANGE_ITERATIONS = 8
"""Power iterations on the change of a merged weight beyond those on the weight itself.

Nothing keeps the change from turning between steps, and with products of thin factors alone they
cost next to nothing beside one iteration on the frozen weight.
"""


@dataclass(slots=True)
class Adapter:
    """LoRA on one weight: the layer computes with `base + lora_scale * up @ down`.

    Attributes:
        down: A, (r, n).
        up: B, (m, r).
        base: W0, (m, n), or (n, m) where the group says `lora_transposed`; frozen.
    """

    down: Weight
    up: Weight
    base: Tensor


def check_factors(params: Sequence[Tensor], options: dict[str, Any]) -> None:
    """Raise ValueError unless the parameters of a group with `lora_scale` are A, B, W0, A, ..."""
    if len(params) % 3:
        raise ValueError(
            "a group with lora_scale has three parameters for each layer (A, B and the frozen "
            f"weight), so {len(params)} cannot be all of one: hf_stable.lora_groups makes such "
            "groups; ZeroRedundancyOptimizer parts them and does not work with lora_scale"
        )
    if not Parts.of(options["parts"]).is_whole:
        raise ValueError(f"a group has either lora_scale or parts={options['parts']}, not both")
    for down, up, base in _threes(params):
        down_shape, up_shape, base_shape = (as_matrix(p).shape for p in (down, up, base))
        merged = (up_shape[0], down_shape[1])
        expected = merged[::-1] if options["lora_transposed"] else merged
        if up_shape[1] != down_shape[0] or tuple(base_shape) != expected:
            raise ValueError(
                f"A {tuple(down.shape)}, B {tuple(up.shape)} and a frozen weight "
                f"{tuple(base.shape)} do not fit with lora_transposed="
                f"{options['lora_transposed']}: needed are (r, n), (m, r) and (m, n), or (n, m) "
                "if transposed"
            )
        if base.requires_grad:
            raise ValueError(
                f"the weight {tuple(base.shape)} under a LoRA adapter is trained itself: freeze it "
                "(requires_grad=False), or leave lora_scale out"
            )


def pair_factors(group: dict[str, Any], weights: Sequence[Weight]) -> list[Adapter]:
    """Return the adapters of a group whose factors have gradients.

    Raises:
        ValueError: if one factor has a gradient and the other has none, or the parameters are
            sharded.
    """
    stepped = {id(weight.param): weight for weight in weights}
    adapters = []
    for down, up, base in _threes(group["params"]):
        ours, theirs = stepped.get(id(down)), stepped.get(id(up))
        if any(isinstance(param, DTensor) for param in (down, up, base)):
            raise ValueError(
                "lora_scale needs whole factors, and these are sharded (FSDP2): use DDP, or leave "
                "lora_scale out"
            )
        if ours is not None and theirs is not None:
            adapters.append(Adapter(ours, theirs, base))
        elif ours is not None or theirs is not None:
            raise ValueError(
                f"of LoRA's factors {tuple(down.shape)} and {tuple(up.shape)} only one has a "
                "gradient: lora_scale bounds what both do together; give a factor that trains "
                "alone a group without it"
            )
    return adapters


def update_adapters(adapters: Sequence[Adapter]) -> None:
    """Step the factors of adapters under Rule 1 for their merged weights, in place.

    With Adam's updates U_A and U_B, one rate for both factors moves the merged weight W by
    `lora_scale * (rate * (U_B A + B U_A) - rate**2 * U_B U_A)`, up to its sign. The rate is the
    largest, up to lr, at which that is at most `tau * sigma1(W)` by the triangle inequality.

    Working memory: copies of the factors of one shape, and their updates.
    """
    together: defaultdict[Any, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        down, up, base = adapter.down.param, adapter.up.param, adapter.base
        kind = (id(adapter.up.group), down.shape, up.shape, down.dtype, up.dtype, base.device)
        together[kind].append(adapter)
    for batch in together.values():
        _step_adapters(batch)


def _threes(params: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(params[::3], params[1::3], params[2::3], strict=True)


def _step_adapters(adapters: list[Adapter]) -> None:
    """Step adapters of one shape and group."""
    weights = [weight for adapter in adapters for weight in (adapter.down, adapter.up)]
    targets = [torch.zeros_like(weight.param) for weight in weights]
    adam_step(weights, targets, lr=target_scale(weights[0]), weight_decay=0.0)
    with torch.autocast(targets[0].device.type, enabled=False):
        rates = _clip_adapters(adapters, *_spectral_norms(adapters, targets[::2], targets[1::2]))
    move(weights, targets, rates.repeat_interleave(2))


def _spectral_norms(
    adapters: list[Adapter], down_targets: list[Tensor], up_targets: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Move the power vectors; return sigma1 of W, of U_B A + B U_A and of U_B U_A, (b,) each."""
    group = adapters[0].up.group
    dtype = spectral_dtype(adapters[0].up.param.dtype)
    down, up, down_target, up_target = (
        torch.stack([as_matrix(tensor.detach()).to(dtype) for tensor in tensors])
        for tensors in (
            [adapter.down.param for adapter in adapters],
            [adapter.up.param for adapter in adapters],
            down_targets,
            up_targets,
        )
    )
    bases = [as_matrix(adapter.base.detach()) for adapter in adapters]
    if group["lora_transposed"]:
        bases = [base.T for base in bases]
    cold = any([_prepare(adapter, down.shape[2], dtype) for adapter in adapters])  # all of them
    steady = group["power_iterations"]
    num_iterations = max(steady, COLD_ITERATIONS) if cold else steady

    merged = _LowRankSum(up * group["lora_scale"], down, bases)
    linear = _LowRankSum(torch.cat([up_target, up], 2), torch.cat([down, down_target], 1))
    quadratic = _LowRankSum(up_target, down_target)
    vectors = [[adapter.up.state[key] for adapter in adapters] for key in LORA_STATE]
    sigmas = []
    for matrices, stored, extra in zip(
        (merged, linear, quadratic), vectors, (0, CHANGE_ITERATIONS, CHANGE_ITERATIONS), strict=True
    ):
        sigma, moved = _power_iterate(matrices, torch.stack(stored), num_iterations + extra)
        torch._foreach_copy_(stored, list(moved.unbind()))
        sigmas.append(sigma)
    # Targets are multiples of -U.
    scale = target_scale(adapters[0].up)
    return sigmas[0], sigmas[1] / scale, sigmas[2] / scale**2


def _prepare(adapter: Adapter, width: int, dtype: torch.dtype) -> bool:
    """Create what an adapter's state lacks; say whether its vectors start from nothing."""
    state, device = adapter.up.state, adapter.up.param.device
    if "exempt" in state and all(key in state for key in LORA_STATE):
        return False
    for factor in (adapter.up, adapter.down):
        for key in RULE_STATE:
            factor.state.pop(key, None)
        factor.state["effective_lr"] = torch.zeros(1, dtype=dtype, device=device)
    for key in LORA_STATE:
        state[key] = generic_vector(width, dtype=dtype, device=device)
    return True


class _LowRankSum(NamedTuple):
    """A batch of matrices `left @ right`, or `whole + left @ right`, known by their products.

    Attributes:
        left: (b, m, k).
        right: (b, k, n).
        whole: b tensors (m, n) of any floating dtype and strides.
    """

    left: Tensor
    right: Tensor
    whole: Sequence[Tensor] = ()

    def times(self, rows: Tensor) -> Tensor:
        """Return the products with the rows (b, n): (b, m)."""
        # The vector on the left: several times faster on a CPU than a one-column right side.
        products = (rows.unsqueeze(1) @ self.right.mT @ self.left.mT).squeeze(1)
        for product, matrix, row in zip(products, self.whole, rows, strict=False):
            product.addmv_(matrix.to(row.dtype), row)
        return products

    def transposed(self) -> _LowRankSum:
        return _LowRankSum(self.right.mT, self.left.mT, [matrix.T for matrix in self.whole])


def _power_iterate(matrices: _LowRankSum, v: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
    """Move right vectors (b, n) by power iterations; return sigma1 (b,) and them."""
    transposed = matrices.transposed()
    for _ in range(num_iterations):
        sigma, _, v = step_batch(matrices.times, transposed.times, None, v)
    return sigma, v


def _clip_adapters(
    adapters: list[Adapter], sigma: Tensor, linear: Tensor, quadratic: Tensor
) -> Tensor:
    """Return one rate for each adapter, and store it with both factors."""
    group = adapters[0].up.group
    for adapter, own in zip(adapters, sigma.unsqueeze(1).unbind(), strict=True):
        # Nothing bounds the way from a merged weight of zero, as with any other weight.
        adapter.up.state.setdefault("exempt", own == 0)
    exempt = torch.cat([adapter.up.state["exempt"] for adapter in adapters])
    # rate * linear + rate**2 * quadratic = allowed, solved without cancellation.
    allowed = group["tau"] * sigma / group["lora_scale"]
    slope = linear + (linear.square() + 4 * quadratic * allowed).sqrt()
    bound = torch.where(exempt | (slope == 0), math.inf, 2 * allowed / slope)
    rates = at_most(bound, group["lr"])
    stored = [f.state["effective_lr"] for adapter in adapters for f in (adapter.down, adapter.up)]
    torch._foreach_copy_(stored, list(rates.unsqueeze(1).repeat_interleave(2, 0).unbind()))
    return rates

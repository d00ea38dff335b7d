"""AdamW2's step and sigma's refresh on a CPU, compiled by numba where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_stable.kernels import tables as t
from hf_stable.kernels.calls import KINDS, Call
from hf_stable.kernels.layouts import Layout, lay_out
from hf_stable.kernels.plans import make_plan
from hf_stable.kernels.weights import (
    RuledWeight,
    TrackedWeight,
    are_plain,
    known_layout,
    triples_of,
)
from hf_stable.measures.matrices import spectral_dtype

__all__ = [
    "Workspace",
    "is_available",
    "refresh_layers",
    "refresh_vectors",
    "step_weights",
    "takes",
    "takes_gradient",
    "tracks",
]

DEVICE = "cpu"
"""The kind of device whose weights they are for."""

AHEAD_NUMEL = 1 << 16
"""Entries from which on a weight is iterated on in the pass that moves it, for the next step. A
smaller one is still in a cache when it is read once more."""

STATE = ("exp_avg", "exp_avg_sq", "step", "exempt", "effective_lr", "weight_v", "update_v")
COLUMNS = (t.FIRST, t.SECOND, t.STEP, t.EXEMPT, t.RATE, t.WEIGHT_V, t.UPDATE_V)
"""What the state of a weight has to have, and where its addresses stand in the table."""


@cache
def is_available() -> bool:
    """Say whether numba is installed."""
    return find_spec("numba") is not None


def are_readable(*tensors: Tensor) -> bool:
    """Say whether compiled code can read tensors by their addresses, in the order of entries."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return False
    return are_plain(tensors)


def takes(weight: RuledWeight) -> bool:
    """Say whether `step_weights` can step a weight: none that is new to Rule 1, among others."""
    param, state, dtype = weight.param, weight.state, weight.param.dtype
    if dtype not in KINDS or "exempt" not in state or not takes_gradient(weight):
        return False
    real = spectral_dtype(dtype)
    dtypes = (dtype, dtype, torch.float32, torch.bool, real, real, real)
    tensors = [state[key] for key in STATE]
    return (
        all(tensor.dtype == own for tensor, own in zip(tensors, dtypes, strict=True))
        and are_readable(param, *tensors)
        and lay_out(param.shape, weight.parts) is not None
    )


def takes_gradient(weight: RuledWeight) -> bool:
    """Say as much of what a step brings anew: gradient and rate."""
    grad, lr = weight.grad, weight.group["lr"]
    return (
        grad.dtype == weight.param.dtype
        and are_readable(grad)
        and not (isinstance(lr, Tensor) and not lr.is_cpu)
    )


class Workspace:
    """What lies ready for the next step of the same weights. It is no state: nothing depends on it.

    The pass that moves a weight iterates on what it has become, for the next step, which uses that
    unless something else has changed the weight or its vector since: then, as without it, it
    iterates first, with the same result, bit for bit. The scratch is as large as the largest
    weight; a fresh one for each step would take longer than the step to be mapped.
    """

    def __init__(self, weights: Sequence[RuledWeight]) -> None:
        """Make room for weights of one dtype."""
        self.dtype = weights[0].param.dtype
        self.called = self._name(weights)
        layouts = [known_layout(weight.param, weight.parts) for weight in weights]
        self.plan = plan = make_plan(tuple(layouts))
        real = spectral_dtype(self.dtype)
        self.goes = np.array([each.numel >= AHEAD_NUMEL and not each.is_vector for each in layouts])
        self.vectors = torch.empty(int(plan.vector_starts[-1]), dtype=real)
        self.sigma = np.zeros(len(plan.parts))
        self.norms = np.zeros((len(plan.chunks), 2))
        self.seen: list[tuple[int, ...]] = []
        updates, sums, products = plan.area
        self.updates = torch.empty(updates, dtype=real)
        self.sums = torch.empty(2 * sums, dtype=real)
        self.products = torch.empty(2 * products, dtype=real)
        self.call = call = Call(self.dtype, plan)
        call.weights[:, t.AHEAD_V] = (
            self.vectors.data_ptr() + plan.vector_starts[:-1] * real.itemsize
        )
        call.weights[:, t.IS_VECTOR] = [layout.is_vector for layout in layouts]
        call.weights[:, t.GOES_AHEAD] = self.goes
        call.hand(t.AHEAD_SIGMA, self.sigma)
        call.hand(t.NORMS, self.norms)

    def is_for(self, weights: Sequence[RuledWeight]) -> bool:
        """Say whether there is room for these weights, in this order."""
        return self.dtype == weights[0].param.dtype and self.called == self._name(weights)

    @staticmethod
    def _name(weights: Sequence[RuledWeight]) -> list[Any]:
        return [(weight.param.shape, weight.parts) for weight in weights]

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        tensors = (self.vectors, self.updates, self.sums, self.products)
        return sum(held.nbytes for held in (*tensors, self.sigma, self.norms))


@torch.no_grad()
def step_weights(weights: Sequence[RuledWeight], workspace: Workspace | None = None) -> Workspace:
    """Take AdamW2's step (Algorithm 1) for weights of one dtype, in place: two passes over each.

    The first moves the moments and writes U to the scratch; the second moves the weight. Each
    iterates on what it has in hand: `z = W.T (W v)` needs a row of W but once, `|z| / |W v|` is
    sigma, and `z / |z|` the next v. An update whose vector has turned gets one iteration more.

    Args:
        weights: those that `takes` says yes to, with their state prepared.
        workspace: what the last call for these weights has returned; None after any other.

    Returns:
        What to hand to the next call.
    """
    if workspace is None or not workspace.is_for(weights):
        workspace = Workspace(weights)
    groups = {id(weight.group): weight.group for weight in weights}
    places = {key: place for place, key in enumerate(groups)}
    ahead = [weight for weight, goes in zip(weights, workspace.goes, strict=True) if goes]
    traces = [_trace(weight) for weight in ahead]
    is_ahead = np.zeros(len(weights), dtype=bool)
    if workspace.seen:
        is_ahead[workspace.goes] = [
            now == old for now, old in zip(traces, workspace.seen, strict=True)
        ]

    call = workspace.call
    table = call.weights
    table[:, t.PARAM] = [weight.param.data_ptr() for weight in weights]
    table[:, t.GRAD] = [weight.grad.data_ptr() for weight in weights]
    for column, key in zip(COLUMNS, STATE, strict=True):
        table[:, column] = [weight.state[key].data_ptr() for weight in weights]
    table[:, t.GROUP] = [places[id(weight.group)] for weight in weights]
    table[:, t.IS_AHEAD], table[:, t.IS_STALE] = is_ahead, False
    options = np.array([_options(group) for group in groups.values()])
    call.run(t.STEP_WEIGHTS, options, workspace.updates, workspace.sums, workspace.products)
    torch.autograd.graph.increment_version([weight.param for weight in weights])
    workspace.seen = [_trace(weight) for weight in ahead]
    return workspace


@torch.no_grad()
def refresh_vectors(
    weights: Sequence[Tensor],
    layouts: Sequence[Layout],
    sigmas: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    iterations: int = 1,
) -> None:
    """Move singular vectors by power iterations, and write sigma and both vectors, in place.

    As `hf_stable.measures.power_iteration.power_step` does it, in one pass over each weight.

    Args:
        weights: plain, of one dtype; the n-th of each other list belongs to the n-th.
        layouts: where their parts lie.
        sigmas: (k,) each, for k parts; of the dtype in which spectra are computed, as the vectors.
        us: left vectors, (k, m) each.
        vs: right vectors, (k, n) each.
        iterations: how many.
    """
    dtype = weights[0].dtype
    plan = make_plan(tuple(layouts))
    call = Call(dtype, plan)
    columns = (t.PARAM, t.RATE, t.WEIGHT_U, t.WEIGHT_V)
    for column, tensors in zip(columns, (weights, sigmas, us, vs), strict=True):
        call.weights[:, column] = [tensor.data_ptr() for tensor in tensors]
    call.head[t.ITERATIONS] = iterations
    call.parts[:, t.WANTED] = 1 << t.OF_WEIGHT
    _, sums, products = plan.area
    rooms = [torch.empty(size, dtype=spectral_dtype(dtype)) for size in (0, sums, products)]
    call.run(t.REFRESH_VECTORS, np.empty(0), *rooms)
    torch.autograd.graph.increment_version([*sigmas, *us, *vs])


def tracks(layer: TrackedWeight, keep: Tensor | None) -> bool:
    """Say whether `refresh_layers` can move the triple of a layer."""
    weight, triple = layer.weight, (layer.sigma, layer.sigma_u, layer.sigma_v)
    real = spectral_dtype(weight.dtype)
    return (
        weight.dtype in KINDS
        and layer.sigma.dtype == layer.sigma_u.dtype == layer.sigma_v.dtype == real
        and are_readable(weight, *triple)
        and (keep is None or keep.is_cpu)
        and lay_out(weight.shape, layer.parts) is not None
    )


def refresh_layers(layers: Sequence[TrackedWeight], keep: Tensor | None) -> None:
    """Move the triples of layers with weights of one dtype, by equally many power iterations.

    Args:
        layers: those that `tracks` says yes to.
        keep: where this tensor of one element is not zero, nothing changes. It is on the CPU, so
            that nobody waits for it.
    """
    if keep is not None and keep.detach().numpy().any():
        return
    refresh_vectors(*triples_of(layers))


def _trace(weight: RuledWeight) -> tuple[int, ...]:
    """Return what changes with a weight or its vector, unless it is written through `.data`."""
    param, v = weight.param, weight.state["weight_v"]
    return id(param), param.data_ptr(), param._version, id(v), v.data_ptr(), v._version


def _options(group: dict[str, Any]) -> tuple[float, ...]:
    """Return the options of a group in the order of `tables`."""
    lr = group["lr"]
    rate = lr.detach().double().numpy().item() if isinstance(lr, Tensor) else lr
    sign = -1.0 if group["maximize"] else 1.0
    return (
        rate, *group["betas"], group["eps"], group["weight_decay"], group["tau"], sign,
        group["power_iterations"],
    )  # fmt: skip

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
from hf_stable.kernels.layouts import Layout, Plan, lay_out, make_plan
from hf_stable.kernels.threads import address_of, runner
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
    "tracks",
]

DEVICE = "cpu"
"""The kind of device whose weights they are for."""

KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
"""Dtypes of weights that are compiled for."""

AHEAD_NUMEL = 1 << 16
"""Entries from which on a weight is iterated on in the pass that moves it, for the next step. A
smaller one is still in a cache when it is read once more."""

STATE = ("exp_avg", "exp_avg_sq", "step", "exempt", "effective_lr", "weight_v", "update_v")


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
    lr = weight.group["lr"]
    if dtype not in KINDS or "exempt" not in state or isinstance(lr, Tensor) and not lr.is_cpu:
        return False
    first, second, *others = (state[key] for key in STATE)
    return (
        weight.grad.dtype == first.dtype == second.dtype == dtype
        and are_readable(param, weight.grad, first, second, *others)
        and lay_out(param.shape, weight.parts) is not None
    )


class Workspace:
    """What lies ready for the next step of the same weights. It is no state: nothing depends on it.

    The pass that moves a weight iterates on what it has become, for the next step, which uses that
    unless something else has changed the weight or its vector since: then, as without it, it
    iterates first, with the same result, bit for bit. The scratch is as large as the largest
    weight; a fresh one for each step would take longer than the step to be mapped.
    """

    def __init__(self, plan: Plan, real: torch.dtype) -> None:
        """Make room for weights of a plan whose spectra are of a dtype."""
        self.plan, self.real = plan, real
        self.vectors = torch.empty(int(plan.vector_starts[-1]), dtype=real)
        self.sigma = np.zeros(len(plan.parts))
        self.norms = np.zeros((len(plan.chunks), 2))
        self.seen: list[tuple[int, ...]] = []
        updates, sums, products = plan.area
        self.updates = torch.empty(updates, dtype=real)
        self.sums = torch.empty(2 * sums, dtype=real)
        self.products = torch.empty(2 * products, dtype=real)

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
    dtype = weights[0].param.dtype
    real = spectral_dtype(dtype)
    layouts = [known_layout(weight.param, weight.parts) for weight in weights]
    plan = make_plan(tuple(layouts))
    if workspace is None or workspace.plan is not plan or workspace.real != real:
        workspace = Workspace(plan, real)
    groups = {id(weight.group): weight.group for weight in weights}
    places = {key: place for place, key in enumerate(groups)}
    goes = np.array([each.numel >= AHEAD_NUMEL and not each.is_vector for each in layouts])
    seen = [_trace(weight) if ahead else () for weight, ahead in zip(weights, goes, strict=True)]
    was = workspace.seen or [(-1,)] * len(weights)

    call = _Call(dtype, plan)
    table = call.weights
    table[:, t.PARAM] = [weight.param.data_ptr() for weight in weights]
    table[:, t.GRAD] = [weight.grad.data_ptr() for weight in weights]
    columns = (
        t.FIRST, t.SECOND, t.STEP, t.EXEMPT, t.RATE, t.WEIGHT_V,
        t.UPDATE_V,
    )  # fmt: skip
    for column, key in zip(columns, STATE, strict=True):
        table[:, column] = [weight.state[key].data_ptr() for weight in weights]
    table[:, t.GROUP] = [places[id(weight.group)] for weight in weights]
    table[:, t.AHEAD_V] = workspace.vectors.data_ptr() + plan.vector_starts[:-1] * real.itemsize
    table[:, t.IS_VECTOR] = [layout.is_vector for layout in layouts]
    table[:, t.GOES_AHEAD] = goes
    table[:, t.IS_AHEAD] = goes & [now == old for now, old in zip(seen, was, strict=True)]
    call.hand(t.OPTIONS, np.array([_options(group) for group in groups.values()]))
    call.hand(t.AHEAD_SIGMA, workspace.sigma)
    call.hand(t.NORMS, workspace.norms)
    call.run(t.STEP_WEIGHTS, workspace.updates, workspace.sums, workspace.products)
    torch.autograd.graph.increment_version([weight.param for weight in weights])
    workspace.seen = [
        _trace(weight) if ahead else () for weight, ahead in zip(weights, goes, strict=True)
    ]
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
    call = _Call(dtype, plan)
    columns = (t.PARAM, t.RATE, t.WEIGHT_U, t.WEIGHT_V)
    for column, tensors in zip(columns, (weights, sigmas, us, vs), strict=True):
        call.weights[:, column] = [tensor.data_ptr() for tensor in tensors]
    call.head[t.ITERATIONS] = iterations
    _, sums, products = plan.area
    rooms = [torch.empty(size, dtype=spectral_dtype(dtype)) for size in (0, sums, products)]
    call.run(t.REFRESH_VECTORS, *rooms)
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


class _Call:
    """One call of compiled code: its head, and the tables that it points to."""

    def __init__(self, dtype: torch.dtype, plan: Plan) -> None:
        from hf_stable.kernels.compiling import compiled  # imports numba: half a second

        self.plan = plan
        self.kept: list[np.ndarray] = []
        self.lead = compiled(f"lead_{KINDS[spectral_dtype(dtype)]}")
        worker = compiled(f"work_{KINDS[dtype]}")
        self.head = np.zeros(t.HEAD_SIZE, dtype=np.int64)
        self.head[t.WORKER] = address_of(worker)
        self.head[t.RUNNER] = runner()
        self.head[t.SIZE] = dtype.itemsize
        self.head[t.REAL_SIZE] = spectral_dtype(dtype).itemsize
        self.head[t.NUM_BATCHES] = len(plan.batches)
        self.weights = np.zeros((len(plan.weights), t.WEIGHT_SIZE), dtype=np.int64)
        self.weights[:, t.WIDTH : t.WIDTH + plan.weights.shape[1]] = plan.weights
        parts = np.zeros((len(plan.parts), t.PART_SIZE), dtype=np.int64)
        parts[:, : plan.parts.shape[1]] = plan.parts
        batches = plan.batches.copy()
        batches[:, t.THREADS] = batches[:, t.THREADS].clip(max=torch.get_num_threads())
        for place, table in (
            (t.WEIGHTS, self.weights), (t.CHUNKS, plan.chunks),
            (t.PIECES, plan.pieces), (t.PARTS, parts), (t.BATCHES, batches),
            (t.VALUES, np.zeros((len(parts), t.VALUE_SIZE))),
        ):  # fmt: skip
            self.hand(place, table)

    def hand(self, place: int, array: np.ndarray) -> None:
        """Hand over an array by its address."""
        self.kept.append(array)
        self.head[place] = array.__array_interface__["data"][0]

    def run(self, task: int, updates: Tensor, sums: Tensor, products: Tensor) -> None:
        """Do a task in the room that there is."""
        head = self.head
        head[t.TASK], head[t.OWN] = task, head.__array_interface__["data"][0]
        for place, room in (
            (t.UPDATES, updates),
            (t.SUMS, sums),
            (t.PRODUCTS, products),
        ):
            head[place] = room.data_ptr()
        head[t.AREA_OF_SUMS], head[t.AREA_OF_PRODUCTS] = self.plan.area[1:]
        self.lead(int(head[t.OWN]))

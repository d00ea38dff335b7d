"""AdamW2's step and sigma's refresh on a CPU, compiled by numba where it is installed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_stable.kernels.layouts import Layout, Plan, make_plan
from hf_stable.kernels.threads import runner

__all__ = [
    "Ahead",
    "Options",
    "RuleColumns",
    "is_available",
    "is_plain",
    "refresh_vectors",
    "step_under_rule",
]

KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
"""Dtypes of weights that are compiled for."""

AHEAD_NUMEL = 1 << 16
"""Entries from which on a weight is iterated on in the pass that moves it, for the next step. A
smaller one is still in a cache when it is read once more."""


@cache
def is_available() -> bool:
    """Say whether numba is installed."""
    return find_spec("numba") is not None


def is_plain(tensor: Tensor) -> bool:
    """Say whether compiled code can read a tensor by its address, in the order of its entries."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.dtype in KINDS
        and tensor.is_contiguous()
    )


class Options(NamedTuple):
    """Options of a group of weights, as `AdamW2` has them; `sign` is -1 to ascend."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    tau: float
    sign: float
    power_iterations: int


@dataclass
class RuleColumns:
    """Weights of one dtype that step under Rule 1: the n-th of each list belongs to the n-th weight.

    Attributes:
        params: the weights. These and the next three are contiguous, of one dtype and shape each.
        grads: their gradients.
        firsts: first moments.
        seconds: second moments.
        steps: steps taken, 0-d float32.
        exempts: whether a part is exempt, (parts,) bool.
        rates: the rate of each part, (parts,), written.
        weight_vs: right vectors of the parts of W, one after the other. Of the dtype in which
            spectra are computed, as `rates` and `update_vs`.
        update_vs: the same of U.
        layouts: where the parts lie.
        groups: which of the options are theirs.
    """

    params: list[Tensor]
    grads: list[Tensor]
    firsts: list[Tensor]
    seconds: list[Tensor]
    steps: list[Tensor]
    exempts: list[Tensor]
    rates: list[Tensor]
    weight_vs: list[Tensor]
    update_vs: list[Tensor]
    layouts: list[Layout]
    groups: list[int]


class Ahead:
    """Iterations on weights that the pass which moved them has made for the next step.

    They are no state: without them the next step makes the same iterations first, with the same
    result, bit for bit. So a weight or a vector that something else has changed since, or replaced,
    simply counts as not iterated on.
    """

    def __init__(self, plan: Plan, real: torch.dtype) -> None:
        """Make room for the vectors of the weights of a plan."""
        self.plan = plan
        self.vectors = torch.empty(int(plan.vector_starts[-1]), dtype=real)
        self.sigma = np.zeros(len(plan.parts))
        self.norms = np.zeros((len(plan.chunks), 2))
        self.seen: list[tuple[int, ...]] = []

    def holds(self, columns: RuleColumns) -> np.ndarray:
        """Say for each weight whether its iteration can be used."""
        now = _states(columns)
        return np.array([a == b for a, b in zip(now, self.seen, strict=False)] or False)

    def note(self, columns: RuleColumns) -> None:
        """Remember what the weights and vectors are that were iterated on."""
        self.seen = _states(columns)


def _states(columns: RuleColumns) -> list[tuple[int, ...]]:
    pairs = zip(columns.params, columns.weight_vs, strict=True)
    return [(id(p), p.data_ptr(), p._version, id(v), v.data_ptr(), v._version) for p, v in pairs]


@torch.no_grad()
def step_under_rule(
    columns: RuleColumns, options: Sequence[Options], ahead: Ahead | None = None
) -> Ahead:
    """Take AdamW2's step (Algorithm 1) for weights of one dtype, in place: two passes over each.

    The first moves the moments and writes U to a scratch of the size of the largest weight; the
    second moves the weight. Each iterates on what it has in hand, for `z = W.T (W v)` needs a row
    of W but once.

    Args:
        columns: the weights, none of which is new to the rule.
        options: of each group.
        ahead: what the last call for these weights has returned; None after any other.

    Returns:
        What to hand to the next call.
    """
    from hf_stable.kernels import loops

    dtype = columns.params[0].dtype
    real = torch.promote_types(dtype, torch.float32)
    plan = make_plan(tuple(columns.layouts))
    if ahead is None or ahead.plan is not plan or ahead.vectors.dtype != real:
        ahead = Ahead(plan, real)
    weights = _weight_table(loops, plan)
    for place, tensors in (
        (loops.PARAM, columns.params), (loops.GRAD, columns.grads),
        (loops.FIRST, columns.firsts), (loops.SECOND, columns.seconds),
        (loops.STEP, columns.steps), (loops.EXEMPT, columns.exempts),
        (loops.RATE, columns.rates), (loops.WEIGHT_V, columns.weight_vs),
        (loops.UPDATE_V, columns.update_vs),
    ):  # fmt: skip
        weights[:, place] = [tensor.data_ptr() for tensor in tensors]
    weights[:, loops.GROUP] = columns.groups
    weights[:, loops.AHEAD_V] = (
        ahead.vectors.data_ptr() + plan.vector_starts[:-1] * ahead.vectors.element_size()
    )
    weights[:, loops.IS_VECTOR] = [layout.is_vector for layout in columns.layouts]
    weights[:, loops.GOES_AHEAD] = [
        layout.numel >= AHEAD_NUMEL and not layout.is_vector for layout in columns.layouts
    ]
    weights[:, loops.IS_AHEAD] = weights[:, loops.GOES_AHEAD] * ahead.holds(columns)
    given = np.array(options, dtype=np.float64)
    call = _Call(loops, dtype, plan, weights)
    call.head[loops.TASK] = loops.STEP_WEIGHTS
    call.give(loops.OPTIONS, given)
    call.give(loops.AHEAD_SIGMA, ahead.sigma)
    call.give(loops.NORMS, ahead.norms)
    call.allocate(real, update=True)
    call.run()
    torch.autograd.graph.increment_version(columns.params)
    ahead.note(columns)
    return ahead


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
        weights: contiguous, of one dtype; the n-th of the other lists belongs to the n-th.
        layouts: where their parts lie.
        sigmas: (parts,) each, of the dtype in which spectra are computed, as the vectors.
        us: left vectors of the parts, one after the other.
        vs: right vectors.
        iterations: how many.
    """
    from hf_stable.kernels import loops

    plan = make_plan(tuple(layouts))
    table = _weight_table(loops, plan)
    for place, tensors in (
        (loops.PARAM, weights), (loops.RATE, sigmas), (loops.WEIGHT_U, us), (loops.WEIGHT_V, vs)
    ):  # fmt: skip
        table[:, place] = [tensor.data_ptr() for tensor in tensors]
    call = _Call(loops, weights[0].dtype, plan, table)
    call.head[loops.TASK] = loops.REFRESH_VECTORS
    call.head[loops.ITERATIONS] = iterations
    call.give(loops.NORMS, np.zeros((len(plan.chunks), 2)))
    call.allocate(torch.promote_types(weights[0].dtype, torch.float32), update=False)
    call.run()


def _weight_table(loops: Any, plan: Plan) -> np.ndarray:
    table = np.zeros((len(plan.weights), loops.WEIGHT_SIZE), dtype=np.int64)
    columns = (
        loops.WIDTH, loops.UPDATE_AT, loops.FIRST_PART, loops.END_PART, loops.FIRST_CHUNK,
        loops.END_CHUNK,
    )  # fmt: skip
    table[:, columns] = plan.weights
    return table


_ROOMS={}
class _Call:
    """One call of compiled code: its head, and what that points to."""

    def __init__(self, loops: Any, dtype: torch.dtype, plan: Plan, weights: np.ndarray) -> None:
        from hf_stable.kernels.compiling import compiled  # imports numba: half a second

        self.loops, self.plan = loops, plan
        self.head = np.zeros(loops.HEAD_SIZE, dtype=np.int64)
        self.kept: list[Any] = []
        real = "float64" if dtype == torch.float64 else "float32"
        self.lead, worker = compiled(f"lead_{real}"), compiled(f"work_{KINDS[dtype]}")
        self.head[loops.WORKER] = ctypes.cast(worker, ctypes.c_void_p).value
        self.head[loops.RUNNER] = runner()
        self.head[loops.SIZE] = dtype.itemsize
        parts = np.zeros((len(plan.parts), loops.PART_SIZE), dtype=np.int64)
        parts[:, : plan.parts.shape[1]] = plan.parts
        batches = plan.batches.copy()
        batches[:, loops.THREADS] = batches[:, loops.THREADS].clip(max=torch.get_num_threads())
        for place, table in (
            (loops.WEIGHTS, weights), (loops.CHUNKS, plan.chunks), (loops.PIECES, plan.pieces),
            (loops.PARTS, parts), (loops.BATCHES, batches),
        ):  # fmt: skip
            self.give(place, table)
        self.head[loops.NUM_BATCHES] = len(batches)
        self.give(loops.VALUES, np.zeros((len(parts), loops.VALUE_SIZE)))

    def give(self, place: int, array: np.ndarray) -> None:
        """Hand over an array by its address."""
        self.kept.append(array)
        self.head[place] = array.__array_interface__["data"][0]

    def allocate(self, real: torch.dtype, *, update: bool) -> None:
        """Make room for the updates of a batch, its sums and its products."""
        loops, (updates, sums, products) = self.loops, self.plan.area
        self.head[loops.REAL_SIZE] = real.itemsize
        self.head[loops.AREA_OF_SUMS], self.head[loops.AREA_OF_PRODUCTS] = sums, products
        matrices = 2 if update else 1
        for place, size in (
            (loops.UPDATES, updates * update),
            (loops.SUMS, sums * matrices),
            (loops.PRODUCTS, products * matrices),
        ):
            room = _ROOMS.setdefault((place,size,real), torch.empty(0)) 
            if room.numel()!=size: room=_ROOMS[(place,size,real)]=torch.empty(size, dtype=real)
            self.kept.append(room)
            self.head[place] = room.data_ptr()

    def run(self) -> None:
        """Run the compiled code."""
        self.head[self.loops.OWN] = address = self.head.__array_interface__["data"][0]
        self.lead(address)

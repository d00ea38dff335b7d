"""AdamW2's step and sigma's refresh on a GPU, by Triton kernels over all weights at once.

Opt-in (`choosing`): they have been tested by Triton's interpreter, on a CPU, and have never run on
a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_stable.kernels.launches import Bucket, Workspace, fits, make_plan
from hf_stable.kernels.layouts import Layout, lay_out
from hf_stable.kernels.weights import (
    RuledWeight,
    TrackedWeight,
    are_plain,
    known_layout,
    triples_of,
)

__all__ = [
    "is_available",
    "refresh_layers",
    "refresh_vectors",
    "step_weights",
    "takes",
    "takes_gradient",
    "tracks",
]

DEVICE = "cuda"
"""The kind of device whose weights they are for."""

DTYPES = (torch.float32, torch.bfloat16)  # float16 is left to torch, as on a CPU
"""Dtypes of weights that there are kernels for; all arithmetic is in float32."""

TILE = 1 << 12
"""Entries that a program works on at once, at least one row."""

STATE = ("exp_avg", "exp_avg_sq", "exempt", "effective_lr", "weight_v", "update_v")


def is_available() -> bool:
    """Say whether triton is installed, with something to run on."""
    return find_spec("triton") is not None and (torch.cuda.is_available() or _is_interpreted())


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_readable(tensor: Tensor) -> bool:
    """Say whether a kernel can read a tensor by its address, in the order of its entries."""
    return (tensor.is_cuda or (tensor.is_cpu and _is_interpreted())) and are_plain((tensor,))


def takes(weight: RuledWeight) -> bool:
    """Say whether `step_weights` can step a weight: none that is new to Rule 1, among others."""
    param, state, dtype = weight.param, weight.state, weight.param.dtype
    if dtype not in DTYPES or "exempt" not in state or not takes_gradient(weight):
        return False
    like_param = (state["exp_avg"], state["exp_avg_sq"])
    layout = lay_out(param.shape, weight.parts)
    return (
        is_readable(param)
        and all(is_readable(tensor) and tensor.dtype == dtype for tensor in like_param)
        and all(is_readable(state[key]) for key in STATE[2:])
        and state["exempt"].dtype == torch.bool
        and all(state[key].dtype == torch.float32 for key in STATE[3:])
        and layout is not None
        and fits(layout)
    )


def takes_gradient(weight: RuledWeight) -> bool:
    """Say as much of what a step brings anew: the gradient."""
    return weight.grad.dtype == weight.param.dtype and is_readable(weight.grad)


@torch.no_grad()
def step_weights(weights: Sequence[RuledWeight], workspace: Workspace | None = None) -> Workspace:
    """Take AdamW2's step (Algorithm 1) for weights of one dtype and device, in place.

    Two passes over each: the first moves the moments and iterates on U and W, the second moves the
    weight. U is not kept between them but computed again. Nothing is read back.

    Args:
        weights: those that `takes` says yes to, with their state prepared.
        workspace: what the last call for these weights has returned; None after any other.

    Returns:
        What to hand to the next call.
    """
    from hf_stable.kernels import triton_loops as loops  # imports triton

    layouts = [known_layout(weight.param, weight.parts) for weight in weights]
    workspace = _ready(workspace, layouts, weights[0].param.device)
    plan = workspace.plan
    torch._foreach_add_([weight.state["step"] for weight in weights], 1.0)
    state = [[weight.state[key] for weight in weights] for key in STATE]
    tensors = [[w.param for w in weights], [w.grad for w in weights], *state]
    shared = _tables(workspace, tensors, [None] * len(weights)) | {
        "factors": _factors(workspace, weights)
    }
    dtype = _triton_dtype(weights[0].param.dtype)
    aligned = all(t.data_ptr() % 16 == 0 for column in tensors[:4] for t in column)
    sums = dict(sums=workspace.sums, squares=workspace.squares, area=plan.areas[0])
    values = dict(values=workspace.values)

    def tiles(bucket: Bucket) -> dict[str, Any]:
        rows = max(1, TILE // bucket.block)
        return dict(DTYPE=dtype, ROWS=rows, ALIGNED=bucket.aligned and aligned)

    def iterate(matrix: int, *, turned_only: bool = False) -> None:
        which = dict(MATRIX=matrix, TURNED_ONLY=turned_only)
        more = shared | sums | values | which | dict(products=workspace.products)
        workspace.launch(loops.iterate_chunks, "chunks", lambda b: more | tiles(b))
        settle(matrix, turned_only=turned_only)

    def settle(matrix: int, *, turned_only: bool = False) -> None:
        which = dict(MATRIX=matrix, TURNED_ONLY=turned_only, keep=workspace.never)
        known = {key: shared[key] for key in ("weights", "chunks", "parts")}
        workspace.launch(loops.settle_parts, "parts", lambda b: known | sums | values | which)

    workspace.launch(loops.update_chunks, "chunks", lambda b: shared | sums | tiles(b))
    for matrix in (0, 1):
        settle(matrix)
    for _ in range(1, max(weight.group["power_iterations"] for weight in weights)):
        for matrix in (0, 1):
            iterate(matrix)
    iterate(1, turned_only=True)
    loops.clip_parts[(len(plan.parts),)](
        shared["weights"], shared["parts"], shared["factors"], workspace.values
    )
    workspace.launch(loops.move_chunks, "chunks", lambda b: shared | values | tiles(b))
    torch.autograd.graph.increment_version([weight.param for weight in weights])
    return workspace


@torch.no_grad()
def refresh_vectors(
    weights: Sequence[Tensor],
    layouts: Sequence[Layout],
    sigmas: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    iterations: int = 1,
    keep: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Workspace:
    """Move singular vectors by power iterations, and write sigma and both vectors, in place.

    Args:
        weights: plain, of one dtype and device; the n-th of each other list belongs to the n-th.
        layouts: where their parts lie.
        sigmas: (k,) float32 each, for k parts, as the vectors.
        us: left vectors, (k, m) each.
        vs: right vectors, (k, n) each.
        iterations: how many.
        keep: where this tensor of one element is not zero, nothing changes.
        workspace: what the last call for these weights has returned; None after any other.

    Returns:
        What to hand to the next call.
    """
    from hf_stable.kernels import triton_loops as loops

    device = weights[0].device
    workspace = _ready(workspace, layouts, device)
    blank: list[Tensor | None] = [None] * len(weights)
    columns: list[list[Any]] = [list(weights), *[blank] * 4, list(sigmas), list(vs), blank]
    shared = _tables(workspace, columns, list(us))
    keep = workspace.never if keep is None else keep.detach().reshape(1).to(device, torch.float32)
    aligned = all(weight.data_ptr() % 16 == 0 for weight in weights)
    common = dict(values=workspace.values, products=workspace.products)
    sums = dict(sums=workspace.sums, squares=workspace.squares, area=workspace.plan.areas[0])
    which = dict(MATRIX=0, TURNED_ONLY=False)
    dtype = _triton_dtype(weights[0].dtype)

    def tiles(bucket: Bucket) -> dict[str, Any]:
        rows = max(1, TILE // bucket.block)
        tile = dict(DTYPE=dtype, ROWS=rows, ALIGNED=bucket.aligned and aligned)
        return tile | dict(factors=workspace.values)  # read for updates alone

    for _ in range(iterations):
        workspace.launch(
            loops.iterate_chunks, "chunks", lambda b: shared | common | sums | which | tiles(b)
        )
        settled = shared | sums | which | dict(values=workspace.values, keep=keep)
        workspace.launch(loops.settle_parts, "parts", lambda b, known=settled: known)  # type: ignore[misc]
    left = shared | common | dict(keep=keep)
    workspace.launch(loops.write_left_vectors, "chunks", lambda b: left)
    torch.autograd.graph.increment_version([*sigmas, *us, *vs])
    return workspace


def tracks(layer: TrackedWeight, keep: Tensor | None) -> bool:
    """Say whether `refresh_layers` can move the triple of a layer."""
    weight, triple = layer.weight, (layer.sigma, layer.sigma_u, layer.sigma_v)
    layout = lay_out(weight.shape, layer.parts)
    return (
        weight.dtype in DTYPES
        and is_readable(weight)
        and all(is_readable(each) and each.dtype == torch.float32 for each in triple)
        and all(each.device == weight.device for each in triple)
        and layout is not None
        and fits(layout)
    )


def refresh_layers(layers: Sequence[TrackedWeight], keep: Tensor | None) -> None:
    """Move the triples of layers with weights of one dtype and device, as `cpu.refresh_layers`."""
    refresh_vectors(*triples_of(layers), keep)


def _ready(
    workspace: Workspace | None, layouts: Sequence[Layout], device: torch.device
) -> Workspace:
    """Return a workspace for weights of these layouts: the given one, if it is of them."""
    plan = make_plan(tuple(layouts))
    if workspace is None or workspace.plan is not plan or workspace.device != device:
        return Workspace(plan, device)
    return workspace


def _tables(
    workspace: Workspace, columns: Sequence[Sequence[Tensor | None]], us: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Return the tables of weights, chunks and parts on the device."""
    plan = workspace.plan
    content = np.zeros((len(plan.shapes), 11), dtype=np.int64)
    for place, tensors in enumerate((*columns, us)):
        content[:, place] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    content[:, 9:] = plan.shapes
    weights = workspace.table("weights", content)
    return dict(weights=weights, chunks=workspace.chunks, parts=workspace.parts)


def _factors(workspace: Workspace, weights: Sequence[RuledWeight]) -> Tensor:
    """Return what each weight's step multiplies with, (n, 10) float32 on the device."""
    groups = {id(weight.group): weight.group for weight in weights}
    rows = [
        (
            0.0 if _is_on_device(group["lr"]) else float(group["lr"]),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["tau"],
            -1.0 if group["maximize"] else 1.0,
        )
        for group in groups.values()
    ]
    options = workspace.table("options", np.array(rows))
    for row, group in enumerate(groups.values()):
        if _is_on_device(group["lr"]):
            options[row, 0].copy_(group["lr"].reshape(()))
    places = {key: place for place, key in enumerate(groups)}
    own = np.array([places[id(weight.group)] for weight in weights])
    lr, beta1, beta2, eps, decay, tau, sign = options[workspace.table("groups", own)].unbind(1)
    steps = torch.stack([weight.state["step"] for weight in weights]).double()
    factors = (
        sign, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**steps),
        (1 - beta2**steps).rsqrt(), eps, decay, lr, tau,
    )  # fmt: skip
    return torch.stack(factors, 1).float()


def _is_on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and not lr.is_cpu


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
    return names[dtype]

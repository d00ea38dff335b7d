"""AdamW2's step and sigma's refresh on a GPU, by Triton kernels over all weights at once.

Opt-in (`choosing`): they have been tested by Triton's interpreter, on a CPU, and have never run on
a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_stable.kernels.layouts import Layout, lay_out
from hf_stable.kernels.weights import RuledWeight, TrackedWeight

__all__ = [
    "Workspace",
    "is_available",
    "is_plain",
    "refresh_layers",
    "refresh_vectors",
    "step_weights",
    "takes",
    "tracks",
]

DEVICE = "cuda"
"""The kind of device whose weights they are for."""

DTYPES = (torch.float32, torch.bfloat16)  # float16 is left to torch, as on a CPU
"""Dtypes of weights that there are kernels for; all arithmetic is in float32."""

MOST_COLUMNS = 1 << 14
"""Columns of a part at most: a program holds a row of it."""

FEWEST_COLUMNS = 64
"""Columns of the smallest blocks: fewer would be more launches for no less work."""

TILE = 1 << 12
"""Entries that a program works on at once, at least one row."""

MOST_CHUNKS = 128
"""Chunks of a part, roughly: programs that share it."""

FEWEST_ROWS = 16
"""Rows of a chunk at least: each adds one row of sums."""

STATE = ("exp_avg", "exp_avg_sq", "exempt", "effective_lr", "weight_v", "update_v")


def is_available() -> bool:
    """Say whether triton is installed, with something to run on."""
    return find_spec("triton") is not None and (torch.cuda.is_available() or _is_interpreted())


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_plain(tensor: Tensor) -> bool:
    """Say whether a kernel can read a tensor by its address, in the order of its entries."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and (tensor.is_cuda or (tensor.is_cpu and _is_interpreted()))
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_inference()  # counts no versions
    )


def takes(weight: RuledWeight) -> bool:
    """Say whether `step_weights` can step a weight: none that is new to Rule 1, among others."""
    param, state, dtype = weight.param, weight.state, weight.param.dtype
    if dtype not in DTYPES or "exempt" not in state:
        return False
    like_param = (weight.grad, state["exp_avg"], state["exp_avg_sq"])
    layout = lay_out(param.shape, weight.parts)
    return (
        is_plain(param)
        and all(is_plain(tensor) and tensor.dtype == dtype for tensor in like_param)
        and all(is_plain(state[key]) for key in STATE[2:])
        and layout is not None
        and fits(layout)
    )


def fits(layout: Layout) -> bool:
    """Say whether a program can hold a row of every part."""
    return layout.most_columns <= MOST_COLUMNS


class Bucket(NamedTuple):
    """Chunks and parts whose rows are of about one length, which are launched together."""

    block: int
    aligned: bool
    first_chunk: int
    num_chunks: int
    first_part: int
    num_parts: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The tables of `triton_loops` that do not depend on the step.

    Attributes:
        chunks: its table of chunks.
        parts: its table of parts.
        shapes: WIDTH and IS_VECTOR of each weight.
        buckets: what is launched together.
        areas: entries of the sums of one matrix, and of the products.
    """

    chunks: np.ndarray
    parts: np.ndarray
    shapes: np.ndarray
    buckets: tuple[Bucket, ...]
    areas: tuple[int, int]


@lru_cache(maxsize=16)
def make_plan(layouts: tuple[Layout, ...]) -> Plan:
    """Cut up the work on weights of these layouts."""
    own: dict[tuple[int, bool], list[tuple[tuple[int, ...], list[list[int]]]]] = {}
    for owner, layout in enumerate(layouts):
        for place, (columns, ranges) in enumerate(_ranges(layout)):
            block = max(FEWEST_COLUMNS, 1 << (min(columns, MOST_COLUMNS) - 1).bit_length())
            aligned = (layout.is_vector or layout.width % 8 == 0) and ranges[0][2] % 8 == 0
            length = 0 if layout.is_vector else columns
            part = (owner, place, place * layout.most_columns, place * layout.most_rows, length)
            own.setdefault((block, aligned), []).append((part, ranges))
    chunks: list[list[int]] = []
    parts: list[tuple[int, ...]] = []
    buckets = []
    sums = products = 0
    for (block, aligned), members in own.items():
        first_chunk, first_part = len(chunks), len(parts)
        for known, ranges in members:
            begin = len(chunks)
            for row, end_row, column, end_column, part_row in ranges:
                where = [row, end_row, column, end_column, sums, products, part_row]
                chunks.append([len(parts), *where])
                sums, products = sums + end_column - column, products + end_row - row
            parts.append((*known, begin, len(chunks)))
        counts = (first_chunk, len(chunks) - first_chunk, first_part, len(parts) - first_part)
        buckets.append(Bucket(block, aligned, *counts))
    shapes = [(each.height if each.is_vector else each.width, each.is_vector) for each in layouts]
    made = [np.array(table, dtype=np.int64) for table in (chunks, parts, shapes)]
    return Plan(made[0], made[1], made[2], tuple(buckets), (sums, products))


def _ranges(layout: Layout) -> list[tuple[int, list[list[int]]]]:
    """Return for each part its columns, and its chunks: rows, columns, row of the part."""
    if layout.is_vector:  # one row, cut along its length
        cuts = [*range(0, layout.height, MOST_COLUMNS), layout.height]
        ranges = [[0, 1, a, b, 0] for a, b in zip(cuts, cuts[1:], strict=False)]
        return [(min(layout.height, MOST_COLUMNS), ranges)]
    found: list[list[list[int]]] = [[] for _ in layout.shapes]
    for band in layout.bands:
        rows = band.stop - band.start
        number = max(1, rows // max(FEWEST_ROWS, -(-rows // MOST_CHUNKS)))
        cuts = [rows * i // number for i in range(number + 1)]
        for piece in band.pieces:
            found[piece.part] += [
                [band.start + a, band.start + b, piece.start, piece.stop, band.part_row + a]
                for a, b in zip(cuts, cuts[1:], strict=False)
            ]
    columns = [width for _, width in layout.shapes]
    return list(zip(columns, found, strict=True))


class Workspace:
    """What lies on the device from step to step of the same weights. It is no state."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Put a plan on a device and make room."""
        self.plan, self.device = plan, device
        self.chunks, self.parts = (self._put(table) for table in (plan.chunks, plan.parts))
        sums, products = plan.areas
        self.sums = torch.empty(2 * sums, device=device)
        self.products = torch.empty(products, device=device)
        self.squares = torch.empty(2 * len(plan.chunks), device=device)
        self.values = torch.zeros(7 * len(plan.parts), device=device)
        self.never = torch.zeros(1, device=device)
        self._tables: dict[str, tuple[Any, Tensor]] = {}

    def table(self, name: str, content: np.ndarray) -> Tensor:
        """Return a table on the device, which is copied there only when it has changed."""
        key = content.tobytes()
        if name not in self._tables or self._tables[name][0] != key:
            self._tables[name] = key, self._put(content)
        return self._tables[name][1]

    def _put(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(array)
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def launch(self, kernel: Any, grid: str, arguments: Callable[[Bucket], dict[str, Any]]) -> None:
        """Launch a kernel on every bucket, a program for each of its chunks or parts."""
        for bucket in self.plan.buckets:
            kernel[(getattr(bucket, f"num_{grid}"),)](
                begin=getattr(bucket, f"first_{grid[:-1]}"),
                num_warps=max(4, min(16, bucket.block // 1024)),
                BLOCK=bucket.block,
                **arguments(bucket),
            )


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

    layouts = [lay_out(weight.param.shape, weight.parts) for weight in weights]
    plan, device = make_plan(tuple(each for each in layouts if each)), weights[0].param.device
    if workspace is None or workspace.plan is not plan or workspace.device != device:
        workspace = Workspace(plan, device)
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

    plan, device = make_plan(tuple(layouts)), weights[0].device
    if workspace is None or workspace.plan is not plan or workspace.device != device:
        workspace = Workspace(plan, device)
    blank: list[Tensor | None] = [None] * len(weights)
    columns: list[list[Any]] = [list(weights), *[blank] * 4, list(sigmas), list(vs), blank]
    shared = _tables(workspace, columns, list(us))
    keep = workspace.never if keep is None else keep.detach().reshape(1).to(device, torch.float32)
    aligned = all(weight.data_ptr() % 16 == 0 for weight in weights)
    common = dict(values=workspace.values, products=workspace.products)
    sums = dict(sums=workspace.sums, squares=workspace.squares, area=plan.areas[0])
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
        and is_plain(weight)
        and all(is_plain(each) and each.dtype == torch.float32 for each in triple)
        and all(each.device == weight.device for each in triple)
        and layout is not None
        and fits(layout)
    )


def refresh_layers(layers: Sequence[TrackedWeight], keep: Tensor | None) -> None:
    """Move the triples of layers with weights of one dtype and device, as `cpu.refresh_layers`."""
    layouts = [lay_out(layer.weight.shape, layer.parts) for layer in layers]
    refresh_vectors(
        [layer.weight for layer in layers],
        [layout for layout in layouts if layout is not None],
        [layer.sigma for layer in layers],
        [layer.sigma_u for layer in layers],
        [layer.sigma_v for layer in layers],
        layers[0].power_iterations,
        keep,
    )


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

"""Which block of a matrix is here, where several processes share it, and with whom it is summed.

A DTensor says for each dimension of its mesh along which dimension of the tensor it is cut: rows
(FSDP2, column-wise tensor parallelism), columns (row-wise tensor parallelism), both, experts of a
stack, pieces of a fused weight. All of it comes to the same description: some rows and some columns
of every matrix are here, and sums over all of it are sums over the processes of some groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from hf_stable.measures.parts import Parts

__all__ = [
    "Held",
    "MatrixShard",
    "Piece",
    "as_local_matrix",
    "groups_of",
    "is_shared",
    "pieces_of",
    "shards_of",
    "take_held",
]

Held = slice | Tensor
"""Places along one dimension: a slice where they lie side by side, else their numbers."""


@dataclass(frozen=True)
class MatrixShard:
    """What this process holds of a matrix (m, n) that others hold the rest of: a block of it.

    It may hold nothing at all; it takes part in every collective all the same.

    Attributes:
        local: (rows here, columns here).
        shape: (m, n) of the whole matrix.
        rows: where the local rows lie in it.
        columns: where the local columns lie in it.
        splits_columns: whether any process holds less than whole rows: the same on all of them.
        groups: process groups; a sum over all shards is one over the first, then the next, ...
    """

    local: Tensor
    shape: tuple[int, int]
    rows: Held
    columns: Held
    splits_columns: bool
    groups: tuple[Any, ...]


class Piece(NamedTuple):
    """Where one matrix lies in the local part of a weight.

    Attributes:
        shape: (m, n) of the whole matrix.
        member: which local matrix of a stack it is; None for one that is elsewhere, and 0 where
            nothing is stacked.
        local_rows: its rows in the local matrix.
        local_columns: its columns there.
        rows: the same rows in the whole matrix.
        columns: the same columns there.
    """

    shape: tuple[int, int]
    member: int | None
    local_rows: Held
    local_columns: Held
    rows: Held
    columns: Held

    def take(self, local: Tensor) -> Tensor:
        """Return the matrix out of the local part of a weight: a view, where slices say it all."""
        if self.member is None:
            return local.new_empty(0, local.shape[-1])[:, self.local_columns]
        return self._member_of(local)[self.local_rows][:, self.local_columns]

    def put(self, local: Tensor, values: Tensor) -> None:
        """Write the matrix into the local part of a weight, where this process holds some of it."""
        if self.member is None:
            return
        rows, columns = self.local_rows, self.local_columns
        if isinstance(rows, Tensor) and isinstance(columns, Tensor):
            rows = rows.unsqueeze(1)
        self._member_of(local)[rows, columns] = values

    def _member_of(self, local: Tensor) -> Tensor:
        return local if local.ndim == 2 or self.member is None else local[self.member]


def is_shared(weight: Tensor) -> bool:
    """Say whether several processes hold parts of a weight.

    Raises:
        ValueError: for a DTensor whose values are still to be summed, or of a mesh without this
            process.
    """
    return isinstance(weight, DTensor) and bool(_cutting_dimensions(weight))


def shards_of(weight: DTensor, parts: Parts) -> list[MatrixShard]:
    """Return what this process holds of each matrix of a shared weight.

    Args:
        weight: for which `is_shared` holds: a matrix, a kernel, a vector, or a stack where the
            parts are stacked.
        parts: where its matrices lie.

    Returns:
        One shard for each matrix; views, but copies where the rows or columns of a part lie apart.

    Raises:
        ValueError: if the weight cannot be cut like this.
    """
    groups = groups_of(weight)
    column_dims = {2} if parts.stacked else set(range(1, weight.ndim))
    cut = {_cut_by(weight.placements[dim], weight.ndim) for dim in _cutting_dimensions(weight)}
    splits_columns = not cut.isdisjoint(column_dims)
    matrix = as_local_matrix(weight.to_local().detach(), parts)
    return [
        MatrixShard(
            piece.take(matrix), piece.shape, piece.rows, piece.columns, splits_columns, groups
        )
        for piece in pieces_of(weight, parts)
    ]


def groups_of(weight: DTensor) -> tuple[Any, ...]:
    """Return the process groups over which a sum over all of a weight is taken, one by one."""
    return tuple(weight.device_mesh.get_group(dim) for dim in _cutting_dimensions(weight))


def as_local_matrix(local: Tensor, parts: Parts) -> Tensor:
    """View the local part of a weight as the matrix, or the stack, of which pieces are taken."""
    return local if parts.stacked else local.reshape(len(local), _numel(local.shape[1:]))


def pieces_of(weight: DTensor, parts: Parts) -> tuple[Piece, ...]:
    """Return where each matrix of a shared weight lies in the local part of it.

    The local part is taken as a matrix, or as a stack where the parts are stacked.

    Raises:
        ValueError: if the weight cannot be cut like this.
    """
    device = weight.to_local().device
    return _pieces(weight.shape, weight.device_mesh, weight.placements, parts, device)


def take_held(spread: Tensor, weight: DTensor) -> Tensor:
    """Return what belongs to the local part of a weight, of a tensor that broadcasts with it."""
    held = _held(weight.shape, weight.device_mesh, weight.placements)
    for dim, places in enumerate(held):
        if spread.shape[dim] > 1:
            spread = spread.index_select(dim, places.to(spread.device))
    return spread


def _cutting_dimensions(weight: DTensor) -> list[int]:
    """Return the dimensions of the mesh along which a weight is cut."""
    mesh, placements = weight.device_mesh, weight.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"cannot take the spectrum of a DTensor placed as {placements}: its values are still "
            "to be summed over processes; redistribute it to Shard or Replicate"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"this process is not in {mesh}, on which a weight lies: only its processes can take "
            "the spectrum"
        )
    return [
        dim
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    ]


def _cut_by(placement: Placement, ndim: int) -> int:
    """Return which dimension of a tensor a placement cuts. torch's strided shards have one too."""
    return int(getattr(placement, "dim")) % ndim  # noqa: B009  # not every placement declares it


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


@lru_cache(maxsize=4096)
def _held(
    shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[Tensor, ...]:
    """Return for each dimension of a tensor the places of which this process holds something.

    torch itself distributes the numbers of the places as it distributed the tensor, so its own
    rules hold for whatever placement.
    """
    held = []
    for dim, length in enumerate(shape):
        own = [_along(placement, dim, len(shape)) for placement in placements]
        numbers = distribute_tensor(torch.arange(length), mesh, own, src_data_rank=None)
        held.append(numbers.to_local().cpu())
    return tuple(held)


def _along(placement: Placement, dim: int, ndim: int) -> Placement:
    """Return what a placement of a tensor means for the numbers along one of its dimensions."""
    if placement.is_replicate() or _cut_by(placement, ndim) != dim:
        return Replicate()
    if placement.is_shard():
        return Shard(0)
    return type(placement)(0, split_factor=placement.split_factor)  # type: ignore[call-arg, attr-defined]  # a strided shard


@lru_cache(maxsize=4096)
def _pieces(
    shape: torch.Size,
    mesh: DeviceMesh,
    placements: tuple[Placement, ...],
    parts: Parts,
    device: torch.device,
) -> tuple[Piece, ...]:
    held = _held(shape, mesh, placements)
    members, (rows, *others) = (held[0], held[1:]) if parts.stacked else (torch.arange(1), held)
    columns, width = torch.zeros(1, dtype=torch.long), 1
    for places, length in zip(others, shape[len(shape) - len(others) :], strict=True):
        columns = (columns.unsqueeze(1) * length + places).flatten()
        width *= length
    height = shape[1] if parts.stacked else shape[0]
    parts.check((*shape[:1], height, width) if parts.stacked else (height, width))
    per_one = [
        _piece_of(part, parts, (height, width), rows, columns, device)
        for part in range(len(parts.shares))
    ]
    local = {int(member): index for index, member in enumerate(members)}
    nothing = slice(0, 0)
    return tuple(
        piece._replace(member=local[member])
        if member in local
        else piece._replace(member=None, local_rows=nothing, rows=nothing)
        for member in range(shape[0] if parts.stacked else 1)
        for piece in per_one
    )


def _piece_of(
    part: int,
    parts: Parts,
    shape: tuple[int, int],
    rows: Tensor,
    columns: Tensor,
    device: torch.device,
) -> Piece:
    """Return where a part of a matrix lies, of which some rows and columns are here."""
    here = [rows, columns]
    length = shape[parts.dim]
    own = torch.full((length,), -1)
    runs = [torch.arange(start, stop) for start, stop, owner in parts.runs(length) if owner == part]
    inside = torch.cat(runs)
    own[inside] = torch.arange(len(inside))
    whole = [own if dim == parts.dim else torch.arange(shape[dim]) for dim in (0, 1)]
    sizes = [len(inside) if dim == parts.dim else shape[dim] for dim in (0, 1)]
    places = [numbers[held] for numbers, held in zip(whole, here, strict=True)]
    kept = [torch.nonzero(each >= 0).flatten() for each in places]
    inner = [each[keep] for each, keep in zip(places, kept, strict=True)]
    local_rows, local_columns = (_as_held(each, device) for each in kept)
    own_rows, own_columns = (_as_held(each, device) for each in inner)
    return Piece((sizes[0], sizes[1]), 0, local_rows, local_columns, own_rows, own_columns)


def _as_held(places: Tensor, device: torch.device) -> Held:
    """Return numbers of places as a slice, where they are one, so that a view will do."""
    if not len(places):
        return slice(0, 0)
    start = int(places[0])
    if torch.equal(places, torch.arange(start, start + len(places))):
        return slice(start, start + len(places))
    return places.to(device)

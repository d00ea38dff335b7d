"""Weights that lie one behind the other in a flat tensor, cut over processes: DeepSpeed ZeRO.

The engine puts such a tensor in the place of a group's parameters and steps it. Adam's moments are
entry by entry and do not mind. Rule 1 needs the matrices: `Piece` says which entries are whose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_stable.adamw2.adam import adam_step
from hf_stable.adamw2.rule import update
from hf_stable.adamw2.weights import MOMENTS, RULE_STATE, Weight, prepare_state
from hf_stable.kernels.choosing import Workspaces
from hf_stable.measures.flat_ranges import FlatRange
from hf_stable.measures.matrices import shapes_of
from hf_stable.measures.parts import WHOLE, Parts

__all__ = [
    "MATRICES",
    "Partition",
    "Piece",
    "rates_of",
    "step_partition",
]

MATRICES = "matrices"
"""Where the state of a flat tensor has what Rule 1 keeps, by the names of weights."""


class Partition(NamedTuple):
    """What a flat tensor is made of.

    Attributes:
        group: number of the group whose options its weights have.
        pieces: the weights of which anything is here, and those that other processes share.
        members: names and shapes of all weights that processes have in this place, the same on
            each of them.
    """

    group: int
    pieces: tuple[Piece, ...]
    members: tuple[tuple[str, torch.Size], ...]


@dataclass(frozen=True)
class Piece:
    """The entries of one weight in a flat tensor.

    Attributes:
        name: of the weight.
        offset: where its entries begin in the flat tensor.
        start: number of the first of them in the weight.
        numel: how many there are; none on a process that has to take part all the same.
        cuts, shape, group: as `FlatRange` has them.
    """

    name: str
    offset: int
    start: int
    numel: int
    cuts: tuple[int, ...]
    shape: torch.Size
    group: Any

    def of(self, flat: Tensor) -> Tensor | FlatRange:
        """View what is here of the weight in a tensor laid out like the flat one."""
        entries = flat.detach()[self.offset : self.offset + self.numel]
        held = FlatRange(entries, self.start, self.cuts, self.shape, self.group)
        return held if held.is_shared else held.whole()


def step_partition(
    flat: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    partition: Partition,
    workspaces: Workspaces,
) -> Tensor | None:
    """Step a flat tensor: entry by entry where nothing is bounded, else weight by weight.

    Args:
        flat: the tensor, with a gradient.
        state: of the tensor. It gains the moments, and what Rule 1 keeps of each weight.
        group: options of its weights.
        partition: what it is made of.
        workspaces: what the kernels keep from step to step for this tensor.

    Returns:
        The rates of all members, one after the other, the same on every process; None where
        nothing is bounded.
    """
    assert flat.grad is not None
    entries = Weight(flat, flat.grad, state, {**group, "tau": math.inf}, WHOLE)
    prepare_state(entries)
    if math.isinf(group["tau"]):
        adam_step([entries], [flat], lr=group["lr"], weight_decay=group["weight_decay"])
        return None
    kept = state.setdefault(MATRICES, {})
    weights = [
        _weight(piece, flat, state, group, kept.setdefault(piece.name, {}))
        for piece in partition.pieces
    ]
    update(weights, workspaces)
    state["step"] += 1
    for weight, piece in zip(weights, partition.pieces, strict=True):
        kept[piece.name] = {key: weight.state[key] for key in RULE_STATE if key in weight.state}
    return _shared_rates(partition, kept, group, flat.device)


def _weight(
    piece: Piece,
    flat: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    kept: dict[str, Tensor],
) -> Weight:
    """Return one weight of a flat tensor, with its state prepared."""
    known = {"step": state["step"].clone(), **kept}  # each counts its own step
    for key in MOMENTS:
        known[key] = _entries(piece.of(state[key]))
    assert flat.grad is not None
    grad = _entries(piece.of(flat.grad))
    weight = Weight(piece.of(flat), grad, known, group, Parts.of(group["parts"]))
    prepare_state(weight)
    return weight


def _shared_rates(
    partition: Partition,
    kept: Mapping[str, Mapping[str, Tensor]],
    group: Mapping[str, Any],
    device: torch.device,
) -> Tensor:
    """Return the rates of all members, each told by the process that holds its first entry."""
    counts = _counts(partition, group)
    rates = torch.zeros(sum(counts.values()), device=device)
    told = {piece.name for piece in partition.pieces if piece.numel and piece.start == 0}
    for (name, count), own in zip(counts.items(), rates.split(list(counts.values())), strict=True):
        if name in told:
            own.copy_(kept[name]["effective_lr"][:count])
    if dist.is_initialized():
        dist.all_reduce(rates)
    return rates


def _counts(partition: Partition, group: Mapping[str, Any]) -> dict[str, int]:
    parts = Parts.of(group["parts"])
    return {name: len(shapes_of(shape, parts)) for name, shape in partition.members}


def rates_of(
    partition: Partition, rates: Tensor | None, group: Mapping[str, Any]
) -> dict[str, float | list[float]]:
    """Return the rates that the members of a flat tensor got in its last step, by their names.

    Args:
        partition: what it is made of.
        rates: what `step_partition` has returned for it.
        group: options of its weights.
    """
    counts = _counts(partition, group)
    if rates is None:
        return dict.fromkeys(counts, float(group["last_lr"]))
    own = rates.cpu().split(list(counts.values()))
    return {
        name: values.tolist() if len(values) > 1 else values.item()
        for name, values in zip(counts, own, strict=True)
    }


def _entries(held: Tensor | FlatRange) -> Tensor:
    return held.local if isinstance(held, FlatRange) else held

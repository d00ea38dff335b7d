"""Where the weights of a model lie in DeepSpeed's flat partitions, as DeepSpeed itself says it.

Its fragment addresses (ZeRO 1 and 2) and its table of positions (ZeRO 3) are private names. They
are read once, when an engine is built, and what they say is compared with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_stable._ranks import values_of_all_ranks
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.adamw2.partitions import Partition, Piece
from hf_stable.architectures.paths import state_dict_name
from hf_stable.measures.flat_ranges import FlatRange
from hf_stable.trainer.changes import ADVICE

__all__ = ["Given", "given_groups", "held_of", "partition_optimizer"]

Given = list[list[tuple[str, nn.Parameter]]]
"""Names and parameters of an optimizer's groups, before an engine has flattened them."""


class Place(NamedTuple):
    """Where the entries of a parameter are that this process steps: in which tensor, and which."""

    flat: Tensor
    offset: int
    start: int
    numel: int


def given_groups(optimizer: AdamW2, model: nn.Module) -> Given:
    """Return what the groups of an optimizer hold that DeepSpeed will flatten."""
    names = {id(param): state_dict_name(name) for name, param in model.named_parameters()}
    return [
        [(names.get(id(p), "unnamed"), p) for p in group["params"] if p.requires_grad]
        for group in optimizer.param_groups
        if group["params"]  # DeepSpeed takes the others out
    ]


def partition_optimizer(engine: Any, given: Given) -> None:
    """Tell the AdamW2 of an engine what the flat tensors are made of that it steps from now on.

    Every rank has to call it.

    Args:
        engine: with ZeRO on.
        given: the groups as they were before the engine was built.

    Raises:
        ImportError: if DeepSpeed's names are not what they were, or say what is not so.
        ValueError: as `AdamW2.partition` does.
    """
    optimizer = engine.basic_optimizer
    partitions: dict[Tensor, Partition] = {}
    for index, members in enumerate(given):
        for flat, name, shape, piece in _pieces(engine, index, members):
            old = partitions.get(flat, Partition(index, (), ()))
            pieces = old.pieces if piece is None else (*old.pieces, piece)
            partitions[flat] = Partition(index, pieces, (*old.members, (name, shape)))
    optimizer.partition(partitions)


def held_of(param: Any) -> FlatRange:
    """Return the entries of a parameter that ZeRO-3 keeps here, without those that fill it up.

    Raises:
        ImportError: if DeepSpeed's names are not what they were.
    """
    return _asking_deepspeed(_held_of, param)


def _held_of(param: Any) -> FlatRange:
    held, numel = param.ds_tensor.data, param.ds_numel
    start = min(dist.get_rank(param.ds_process_group) * held.numel(), numel)
    return FlatRange(
        held[: numel - start],
        start,
        tuple(range(held.numel(), numel, held.numel())),
        torch.Size(param.ds_shape),
        param.ds_process_group,
    )


def _pieces(
    engine: Any, index: int, members: Sequence[tuple[str, nn.Parameter]]
) -> Iterator[tuple[Tensor, str, torch.Size, Piece | None]]:
    """Yield the flat tensor, name and shape of a group's weights, and what is here of each."""
    find = _place_in_3 if engine.zero_optimization_partition_weights() else _place_in_1_and_2
    places = [_asking_deepspeed(find, engine, index, param) for _, param in members]
    everywhere = values_of_all_ranks([(place.start, place.numel) for place in places])
    for number, ((name, param), place) in enumerate(zip(members, places, strict=True)):
        starts = [rank[number][0] for rank in everywhere if rank[number][1]]
        cuts = tuple(sorted(start for start in starts if start))
        shape = torch.Size(getattr(param, "ds_shape", param.shape)) or torch.Size((1,))
        piece = None  # all of it is on another rank
        if cuts or place.numel:
            _, offset, start, numel = place
            piece = Piece(name, offset, start, numel, cuts, shape, dist.group.WORLD)
            _compare(piece, place.flat, param)
        yield place.flat, name, shape, piece


def _place_in_1_and_2(engine: Any, index: int, param: Any) -> Place:
    """Return where a parameter is in this rank's partition of its group."""
    (flat,) = engine.basic_optimizer.param_groups[index]["params"]
    mapping = param._hp_mapping
    if mapping is None:
        return Place(flat, 0, param.numel(), 0)
    high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Place(flat, high.start, low.start, low.numel)


def _place_in_3(engine: Any, index: int, param: Any) -> Place:
    """Return where the share of a parameter is that this rank steps."""
    zero = engine.optimizer
    sub_group, offset, _ = zero.grad_position[zero.get_param_id(param)]
    held = _held_of(param)
    return Place(zero.fp32_partitioned_groups_flat[sub_group], offset, held.start, len(held.local))


def _compare(piece: Piece, flat: Tensor, param: Any) -> None:
    """Raise ImportError unless a flat tensor has the entries of a parameter where it should."""
    master = flat.detach()[piece.offset : piece.offset + piece.numel]
    own = (
        _held_of(param).local
        if hasattr(param, "ds_tensor")
        else param.detach().flatten()[piece.start : piece.start + piece.numel]
    )
    if not torch.equal(master.to(own), own):
        raise ImportError(
            f"hf_stable does not fit deepspeed {version('deepspeed')}: the entries of "
            f"{piece.name!r} are not where it says they are in its partition. {ADVICE}"
        )


def _asking_deepspeed(ask: Callable[..., Any], *args: Any) -> Any:
    try:
        return ask(*args)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ImportError(
            f"hf_stable does not fit deepspeed {version('deepspeed')}: its partitions are not "
            f"described as they were ({type(error).__name__}: {error}). {ADVICE}"
        ) from error

"""Whether all ranks patch a model alike: those that do not would wait for each other for ever.

Weights that ranks share take collectives of all of them, when a model is patched and at each step.
So the ranks compare what they are about to do first, and every one of them is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import nn

from hf_stable._json import from_json, to_json
from hf_stable._ranks import is_divided, num_ranks, values_of_all_ranks
from hf_stable.methods.config import MethodConfig
from hf_stable.methods.layernorms.removal import removed_norms
from hf_stable.methods.sigma_reparam.method import sigma_layers

__all__ = [
    "note_patch",
    "refuse_different_configs",
    "refuse_different_patches",
    "refuse_different_shards",
]

_POSTED = "hf_stable/patches"
_PATIENCE = timedelta(minutes=30)
"""What torch gives the ranks for a collective."""

_num_compared: Counter[tuple[int, ...]] = Counter()


def refuse_different_configs(
    model: nn.Module, configs: Iterable[MethodConfig], present: Iterable[MethodConfig]
) -> None:
    """Raise on every rank if ranks are about to patch a model differently that they share.

    Nothing is compared where each rank has a model of its own.

    Args:
        model: plain, or patched already.
        configs: what is asked for.
        present: what is in force.

    Raises:
        ValueError: naming both configs.
    """
    if not any(map(is_divided, model.parameters())):
        return
    mine = [*sorted(map(repr, configs)), *sorted(f"{config}, in force" for config in present)]
    for rank, theirs in enumerate(values_of_all_ranks(mine)):
        if theirs != mine:
            raise ValueError(
                "the ranks patch a model differently that they share: this one with "
                f"{'; '.join(mine)}, rank {rank} with {'; '.join(theirs) or 'nothing'}. Call "
                "hf_stable.patch with the same arguments on every rank"
            )


def refuse_different_patches(model: nn.Module) -> None:
    """Raise on every rank if ranks have patched a model differently. Every rank has to call it.

    Raises:
        ValueError: naming what a layer or norm has become.
    """
    mine = _described(model)
    _compare(mine, dict(enumerate(values_of_all_ranks(mine))))


def note_patch() -> None:
    """Let other ranks know that this one patches a model; it waits for nobody."""
    if num_ranks() > 1:
        _store().set(f"{_POSTED}/by/{dist.get_rank()}", "")


def refuse_different_shards(model: nn.Module, ranks: Sequence[int]) -> None:
    """Raise on every rank if those that share a model have patched it differently.

    No collective will do: a rank that knows nothing of a patch would not take part. So each posts
    what it has. It waits for the others only if its model is patched or another rank has patched
    one.

    Args:
        model: of this rank, patched or plain.
        ranks: that share it. Each of them has to call this for the same models in the same order.

    Raises:
        ValueError: naming what a layer or norm has become, or a rank that has posted nothing.
    """
    group, rank, store = tuple(sorted(ranks)), dist.get_rank(), _store()
    _num_compared[group] += 1
    place = f"{_POSTED}/{'-'.join(map(str, group))}/{_num_compared[group]}"
    mine = _described(model)
    store.set(f"{place}/{rank}", to_json(mine))
    others = [each for each in group if each != rank]
    if not mine and not any(store.check([f"{_POSTED}/by/{each}"]) for each in others):
        return
    for each in others:
        _wait_for(store, f"{place}/{each}", each)
    theirs = {each: from_json(store.get(f"{place}/{each}").decode()) for each in others}
    _compare(mine, theirs)


def _wait_for(store: dist.Store, key: str, rank: int) -> None:
    try:
        store.wait([key], _PATIENCE)
    except RuntimeError as error:
        raise ValueError(
            f"rank {rank} has not said within {_PATIENCE} how its model is patched, which this one "
            "shares. Import hf_stable and call hf_stable.patch with the same arguments on every "
            "rank"
        ) from error


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _described(model: nn.Module) -> list[str]:
    return [
        f"{name}: {layer.parts}, power_iterations={layer.power_iterations}, "
        f"trained={layer.weight.requires_grad}"
        for name, layer in sigma_layers(model)
    ] + [f"{name}: removed" for name, _ in removed_norms(model)]


def _compare(mine: list[str], everyone: dict[int, list[str]]) -> None:
    for rank, theirs in everyone.items():
        if theirs != mine:
            odd = (sorted(set(theirs) ^ set(mine)) or mine)[0]
            raise ValueError(
                f"the ranks have patched the model differently: {odd!r} is on one of this rank, "
                f"with {len(mine)} patched layers, and rank {rank}, with {len(theirs)}. "
                "Call hf_stable.patch with the same arguments on every rank"
            )

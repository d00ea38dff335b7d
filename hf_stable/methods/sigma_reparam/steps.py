"""One power iteration per optimizer step, for the sigma layers whose weights just moved.

Outside the forward, so that gradient checkpointing sees one u and v in both of its forwards, that
results do not depend on the number of micro-batches, and that evaluation moves nothing. A global
hook of torch does it, so any loop and any optimizer will do.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hf_stable._late_changes import make_late_changes
from hf_stable._live_objects import live_instances
from hf_stable.kernels.choosing import refresh_layers
from hf_stable.kernels.reference import refresh_layers as refresh_by_torch
from hf_stable.measures.flat_ranges import FlatRange
from hf_stable.measures.parts import Parts
from hf_stable.methods.sigma_reparam.folded_gammas import warn_of_folded
from hf_stable.methods.sigma_reparam.triples import LayerWithTriple, mark_settled

__all__ = [
    "check_gammas",
    "follow",
    "forget",
    "hooks_are_installed",
    "install_hooks",
    "live_layers",
    "refresh",
    "rate_is_zero",
]

_serial_numbers = itertools.count()
_live: WeakSet[Any] = WeakSet()
_stepping: list[ref[Optimizer]] = []
# Serial numbers of layers whose weight, and of those whose gamma, has been seen in an optimizer. A
# layer that is folded and patched again is new.
_checked: WeakKeyDictionary[Optimizer, tuple[set[int], set[int]]] = WeakKeyDictionary()
_told: WeakSet[Optimizer] = WeakSet()
_hooks: list[Any] = []


def follow(layer: LayerWithTriple) -> None:
    """Refresh a layer after each step of an optimizer that owns its weight, while it lives.

    The layer is numbered, held weakly, and the hooks are installed where they are not yet.
    """
    layer.serial_number = next(_serial_numbers)
    _live.add(layer)
    install_hooks()


def forget(layer: LayerWithTriple) -> None:
    """Refresh a layer no more."""
    _live.discard(layer)


def live_layers() -> list[LayerWithTriple]:
    """Return every layer that is followed, oldest first, the same order on every rank."""
    return sorted(_live, key=lambda layer: layer.serial_number)


def install_hooks() -> None:
    """Hook every optimizer of this process, once; later calls change nothing."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
    if len(_hooks) < 2:  # an interrupt may have come between the two
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def hooks_are_installed() -> bool:
    """Say whether `install_hooks` has been called in this process."""
    return len(_hooks) == 2


@torch.no_grad()
def refresh(
    layers: Sequence[LayerWithTriple],
    keep: Tensor | None = None,
    weights: Sequence[FlatRange] | None = None,
) -> None:
    """Move u and v of the layers by power iterations and set sigma from them, in place.

    Zhai et al. 2023, section 3.3: `u <- normalize(W v)`, `v <- normalize(W.T u)`,
    `sigma = u.T W v`. A weight that has turned non-finite gets a NaN sigma and keeps its
    vectors. No host synchronisation; every rank of a sharded weight has to call it.

    Args:
        layers: sigma layers, the same and in the same order on every rank.
        keep: where this 0-d or (1,) tensor is not zero, everything stays as it is (the step was
            skipped because a gradient overflowed).
        weights: what is here of each layer's weight, where its parameter does not hold it (between
            the steps of DeepSpeed ZeRO-3).
    """
    if weights is None:
        refresh_layers([_Held(layer, layer.weight) for layer in layers], keep)
    else:
        pairs = zip(layers, weights, strict=True)
        refresh_by_torch([_Held(layer, weight) for layer, weight in pairs], keep)
    for layer in layers:
        mark_settled(layer)


class _Held:
    """A layer with its weight, or with what is here of it where its parameter does not hold it.

    Kernels ask for each of these several times, which a module answers slowly.
    """

    __slots__ = ("parts", "power_iterations", "sigma", "sigma_u", "sigma_v", "weight")

    def __init__(self, layer: LayerWithTriple, weight: Any) -> None:
        self.weight = weight
        self.parts: Parts = layer.parts
        self.power_iterations = layer.power_iterations
        self.sigma, self.sigma_u, self.sigma_v = layer.sigma, layer.sigma_u, layer.sigma_v


def check_gammas(layers: Sequence[LayerWithTriple], groups: Sequence[dict[str, Any]]) -> None:
    """Check the groups of an optimizer that takes other tensors than the model's later on.

    DeepSpeed puts flat partitions in the place of parameters, so that no step shows what is owned.

    Args:
        layers: of the model.
        groups: as the optimizer was given them.

    Raises:
        RuntimeError: if the weight of a layer is among them but not its gamma.
    """
    owned = {id(p) for group in groups for p in group["params"]}
    moving = [layer for layer in layers if layer.weight.requires_grad and id(layer.weight) in owned]
    if moving:
        _check_gammas_are_trained(moving, owned)
    _warn_of_decay([layer for layer in layers if id(layer.gamma) in owned], groups)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    make_late_changes()
    _stepping.append(ref(optimizer))


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    while _stepping and _stepping.pop()() is not optimizer:
        pass  # steps that ended in an exception never came back here
    if any(_wraps(outer(), optimizer) for outer in _stepping):
        return  # ZeroRedundancyOptimizer: the weights are whole after its own step, not before
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    live = live_layers()
    weights = [layer.weight for layer in live]
    layers = [
        layer
        for layer, weight in zip(live, weights, strict=True)
        if weight.requires_grad and id(weight) in owned
    ]
    if optimizer not in _told and warn_of_folded(owned, (id(layer.gamma) for layer in live)):
        _told.add(optimizer)
    with_weights, with_gammas = _checked.setdefault(optimizer, (set(), set()))
    unseen = [layer for layer in layers if layer.serial_number not in with_weights]
    if unseen:
        _check_gammas_are_trained(unseen, owned)
        with_weights.update(layer.serial_number for layer in unseen)
    gammas = [layer for layer in live if id(layer.gamma) in owned]
    unseen = [layer for layer in gammas if layer.serial_number not in with_gammas]
    if unseen:
        _warn_of_decay(unseen, optimizer.param_groups)
        with_gammas.update(layer.serial_number for layer in unseen)
    if not layers:
        return
    # torch makes a step of rate zero to create the state that it then loads (resume under FSDP2):
    # another power iteration there would continue from other vectors than were saved.
    if any(rate_is_zero(group) for group in optimizer.param_groups):
        moved = {id(p) for g in optimizer.param_groups if not rate_is_zero(g) for p in g["params"]}
        layers = [layer for layer in layers if id(layer.weight) in moved]
    if layers:
        # Set while a GradScaler hands the step to a fused kernel, which may have skipped it.
        refresh(layers, keep=getattr(optimizer, "found_inf", None))


def rate_is_zero(group: dict[str, Any]) -> bool:
    """Say whether a step moves nothing of a group of an optimizer."""
    rate = group.get("lr")
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return False  # not read back from a device; torch's zero is on the CPU
    return rate is not None and float(rate) == 0.0


def _wraps(outer: Optimizer | None, inner: Optimizer) -> bool:
    return outer is not None and any(value is inner for value in vars(outer).values())


def _warn_of_decay(layers: Sequence[LayerWithTriple], groups: Sequence[dict[str, Any]]) -> None:
    """Warn of gammas that an optimizer's groups decay.

    They are not exempted here: what the groups of an optimizer say, its state and the records of
    the run say too.
    """
    decayed = {
        id(p): group["weight_decay"] for group in groups if _decays(group) for p in group["params"]
    }
    found = [layer for layer in layers if id(layer.gamma) in decayed]
    if found:
        warnings.warn(
            f"weight_decay={decayed[id(found[0].gamma)]} is applied to gamma of {len(found)} "
            f"reparametrised layers (first: {found[0].layer_name!r}). gamma is the spectral norm "
            "of a weight, and decay pulls it to zero whatever the loss says. Put parameters "
            'whose name ends in "gamma" into the group without decay (no_decay = ["bias", '
            '"LayerNorm.weight", "gamma"]), or take the groups of '
            "hf_stable.parameter_groups(model, weight_decay=...)",
            UserWarning,
            stacklevel=4,
        )


def _decays(group: dict[str, Any]) -> bool:
    decay = group.get("weight_decay")
    if isinstance(decay, Tensor) and decay.device.type != "cpu":
        return True  # not read back from a device; whoever moves it there means to decay
    return decay is not None and float(decay) != 0.0


def _check_gammas_are_trained(layers: Sequence[LayerWithTriple], owned: set[int]) -> None:
    """Raise if the weight of a layer moves but its gamma never will, or not in step with others.

    A frozen gamma is warned of: it may be meant, or left over from a weight that was frozen too.
    """
    frozen = [layer for layer in layers if not layer.gamma.requires_grad]
    if frozen:
        warnings.warn(
            f"{len(frozen)} reparametrised layers (first: {frozen[0].layer_name!r}) train their "
            "weight under a frozen gamma, so their spectral norms stay as they are. gamma starts "
            "frozen where its weight is when hf_stable.patch is called: unless this is meant, "
            "unfreeze it too, before the optimizer is built",
            UserWarning,
            stacklevel=4,
        )
    missing = [
        layer for layer in layers if layer.gamma.requires_grad and id(layer.gamma) not in owned
    ]
    if missing:
        # Another optimizer may have them: matrices to one, everything else to another. One that
        # has the weight as well is an earlier one.
        others = [
            {id(p) for group in other.param_groups for p in group["params"]}
            for other in live_instances(Optimizer)
        ]
        missing = [
            layer
            for layer in missing
            if not any(id(layer.gamma) in o and id(layer.weight) not in o for o in others)
        ]
    if missing:
        raise RuntimeError(
            f"{len(missing)} reparametrised layers (first: {missing[0].layer_name!r}) have their "
            "weight in the optimizer but not their gamma, which would never be trained. The "
            "parameters were collected before hf_stable.patch added gamma. Call it first, then "
            "collect the groups (model.named_parameters()), build the optimizer and wrap the "
            "model"
        )
    _check_gammas_are_averaged(layers)


def _check_gammas_are_averaged(layers: Iterable[LayerWithTriple]) -> None:
    """Raise if DDP averages the weight of a layer over ranks but not its gamma."""
    if not torch.distributed.is_initialized():
        return
    for ddp in live_instances(DistributedDataParallel):
        reduced = {id(p) for p in ddp._module_parameters}
        for layer in layers:
            if id(layer.weight) in reduced and id(layer.gamma) not in reduced:
                raise RuntimeError(
                    f"gamma of {layer.layer_name!r} is not averaged over ranks: the model was "
                    "wrapped in DistributedDataParallel before hf_stable.patch. Patch first"
                )

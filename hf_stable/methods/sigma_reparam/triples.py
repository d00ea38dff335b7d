"""Keep the singular triple of a sigma layer in step with its weight, however that changes.

Optimizer steps are followed by `steps`. This is about every other way to change a weight: an
average of weights, a state dict of a plain model, an assignment.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_stable._ranks import failing_together, is_divided, is_partitioned, whole_tensor
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.kernels.weights import PLAIN, TrackedWeight
from hf_stable.measures.leading import leading_triple
from hf_stable.measures.matrices import as_matrix, local_matrices, spectral_dtype
from hf_stable.measures.parts import Parts
from hf_stable.methods.sigma_reparam.part_arithmetic import sigma_of, vectors_of

__all__ = [
    "SIGMA_TENSORS",
    "LayerWithTriple",
    "check_own",
    "check_present",
    "mark_moved",
    "mark_settled",
    "settle",
    "settle_cast",
    "settle_given",
    "settle_if_moved",
    "settle_loaded",
]

SIGMA_TENSORS = ("gamma", "sigma", "sigma_u", "sigma_v")
"""What a sigma layer has beside the tensors of the plain layer."""

TOLERANCE = 1e-5
"""A stored sigma this close to `u.T W v` (relative) is that of W: float32 rounds to about 1e-6.
A W of less precision may be the rounding of one whose sigma it is: see `_tolerance`."""

MOVED = -1

NUM_ENTRIES = 64
"""Entries of a weight that are compared where nobody says that it has moved: some of every band of
rows and of columns."""


class LayerWithTriple(TrackedWeight, Protocol):
    """What a sigma layer has to have here and in `steps`; see `layers.SigmaLayer`."""

    layer_name: str
    serial_number: int
    settled_for: tuple[int, int]
    seen_entries: Tensor | None
    training: bool

    @property
    def gamma(self) -> Tensor:
        """(k,) the learnable scale of each part."""


def mark_settled(layer: LayerWithTriple) -> None:
    """Note that the triple belongs to the weight as it is now."""
    weight = layer.weight
    # A step has written it: nobody needs to look now. Not by attributes, which a module searches.
    vars(layer).update(settled_for=(id(weight), _version(weight)), seen_entries=None)


def mark_moved(layer: LayerWithTriple) -> None:
    """Note that the weight may have changed in ways that leave no trace (`.data`, a copy)."""
    layer.settled_for = (id(layer.weight), MOVED)


def check_present(layer: LayerWithTriple) -> None:
    """Raise UnsupportedModelError for a layer whose weight is elsewhere: accelerate offloads it."""
    if layer.weight.is_meta or layer.gamma.is_meta:
        raise UnsupportedModelError(
            f"the weight of {layer.layer_name!r} is offloaded: accelerate brings it for each "
            "forward alone. Call accelerate.hooks.remove_hook_from_module(model, recurse=True), "
            "which brings all of them back, or load the model without offloading"
        )


def check_own(layer: nn.Module, name: str, parameter: str = "weight") -> None:
    """Raise UnsupportedModelError for a layer whose weight is computed from other tensors.

    torch's pruning, `weight_norm`, `spectral_norm` and parametrizations put another tensor in the
    place of the parameter, anew for each forward. No optimizer moves that one, so that nothing
    would tell when sigma has to follow.
    """
    # DataParallel's replicas have tensors in the place of all their parameters.
    if parameter in layer._parameters or getattr(layer, "_is_replica", False):
        return
    raise UnsupportedModelError(
        f"the weight of {name!r} is no parameter: pruning, weight_norm, spectral_norm or another "
        "parametrization of torch computes it from others, and sigma would not follow it. Make "
        "that permanent (torch.nn.utils.prune.remove, remove_weight_norm, "
        "parametrize.remove_parametrizations), or leave the layer out by exclude=[...]. On a "
        "patched model, call hf_stable.fold before it is put on"
    )


def settle_if_moved(layer: LayerWithTriple, *, look: bool = False) -> None:
    """Settle a layer whose weight was changed in place by anything but an optimizer step.

    Two integers are compared. Writes through `.data` leave no trace in them: averages of weights
    that are put in the place of others, teachers that follow a student. Where no step moves the
    weight, some of its entries are compared too, if asked for. Nothing is done for a weight that is
    not the layer's own (`functional_call`, what FSDP2 gathers for a forward), nor in compiled code.

    Args:
        layer: a sigma layer.
        look: compare entries. Host synchronisation: yes, then.
    """
    if torch.compiler.is_compiling():
        return
    weight = layer.weight
    identity, version = layer.settled_for
    if identity != id(weight):
        check_own(cast(nn.Module, layer), layer.layer_name)
        return
    if is_partitioned(weight):
        return
    if version != _version(weight) or (look and _has_moved_unseen(layer, weight)):
        settle(layer)


def _has_moved_unseen(layer: LayerWithTriple, weight: Tensor) -> bool:
    if (layer.training and weight.requires_grad) or isinstance(weight, DTensor):
        return False
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    seen, entries = layer.seen_entries, _some_entries(weight, layer.parts)
    if seen is None or seen.device != entries.device or seen.dtype != entries.dtype:
        return True  # not looked at since it was trained, or elsewhere: all of it is, once
    return not torch.equal(seen, entries)


def _some_entries(weight: Tensor, parts: Parts) -> Tensor:
    """View entries of a weight along the diagonal of its matrix, or some of each of a stack."""
    if parts.stacked:
        entries = weight.detach().flatten()
        # One more than a share of them: it is no multiple of a row, which would be one column.
        return entries[:: 1 + len(entries) // max(NUM_ENTRIES, 2 * len(weight))]
    if type(weight) not in PLAIN or weight.ndim != 2:
        diagonal = as_matrix(weight.detach()).diagonal()
        return diagonal[:: max(1, len(diagonal) // NUM_ENTRIES)]
    # The same in one call: every layer looks at each token that a model generates.
    length = min(weight.shape)
    every = max(1, length // NUM_ENTRIES)
    stride = every * sum(weight.stride())
    held = weight.detach() if torch.is_grad_enabled() else weight
    return held.as_strided((-(-length // every),), (stride,), weight.storage_offset())


@torch.no_grad()
def settle(layer: LayerWithTriple) -> None:
    """Set sigma, u and v from the weight, exactly, unless sigma is that of the weight already.

    A triple that a running training left in place is kept bit for bit, so looking moves nothing.
    Host synchronisation: yes. Every rank of a sharded weight has to call it.

    Raises:
        UnsupportedModelError: as `check_present` and `check_own` do.
    """
    if isinstance(layer, nn.Module):
        check_own(layer, layer.layer_name)
    check_present(layer)
    weight: Any = layer.weight
    whole = whole_tensor(weight)
    with failing_together(is_divided(weight)):
        _settle_to(layer, whole.to(layer.sigma.device))  # an offloaded shard is on the CPU
    mark_settled(layer)
    if not is_divided(weight):
        layer.seen_entries = _some_entries(weight, layer.parts).clone()


def _settle_to(layer: LayerWithTriple, whole: Tensor) -> None:
    with torch.autocast(whole.device.type, enabled=False):
        now = sigma_of(whole, layer.sigma_u, layer.sigma_v, layer.parts)
    if not torch.allclose(now, layer.sigma, rtol=_tolerance(whole.dtype), atol=0, equal_nan=True):
        matrices = local_matrices(whole, layer.parts)
        vectors = vectors_of(layer.sigma_u, layer.sigma_v, matrices)
        for part, (matrix, (u, v)) in enumerate(zip(matrices, vectors, strict=True)):
            if torch.isfinite(now[part]):
                triple = leading_triple(matrix)
                layer.sigma[part] = triple.sigma
                u.copy_(triple.u)
                v.copy_(triple.v)
            else:  # the vectors stay, as in `steps`
                layer.sigma[part] = now[part]


def _tolerance(dtype: torch.dtype) -> float:
    """Return how far sigma may be from `u.T W v` where W was cast, and nothing else has happened.

    A cast model computes what it computed, up to the rounding of its weights. In training sigma is
    late, so an exact one in its place would change a layer by some ten percent.
    """
    return max(TOLERANCE, torch.finfo(dtype).eps / 2)  # a cast rounds to the nearest


@torch.no_grad()
def settle_cast(layer: LayerWithTriple, before: torch.dtype) -> None:
    """Take `u.T W v` for sigma where a weight was cast to more precision, as which nothing rounds.

    A triple that fitted no more before the cast is left to `settle`.

    Args:
        layer: after the cast.
        before: dtype of its weight before.
    """
    weight: Any = layer.weight
    if weight.is_meta or isinstance(weight, DTensor) or is_partitioned(weight):
        return
    if _tolerance(before) <= _tolerance(weight.dtype):
        return
    with torch.autocast(weight.device.type, enabled=False):
        now = sigma_of(weight, layer.sigma_u, layer.sigma_v, layer.parts)
    if torch.allclose(now, layer.sigma, rtol=_tolerance(before), atol=0):
        layer.sigma.copy_(now)


def settle_given(layer: LayerWithTriple, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the triple that belongs to a weight of a state dict, as `settle` finds it.

    Args:
        layer: whose weight it is; it stays as it is.
        given: "weight", "sigma", "sigma_u" and "sigma_v", whole and on one device.

    Returns:
        "sigma", "sigma_u" and "sigma_v": those that were given, where they fit, else new ones.
    """
    weight = given["weight"]
    names = ("sigma", "sigma_u", "sigma_v")
    triple = {name: given[name].to(spectral_dtype(weight.dtype), copy=True) for name in names}
    stand_in: Any = SimpleNamespace(
        layer_name=layer.layer_name,
        parts=layer.parts,
        weight=weight,
        gamma=layer.gamma,
        **triple,
    )
    settle(stand_in)
    return triple


@torch.no_grad()
def settle_loaded(layer: LayerWithTriple, given: set[str]) -> None:
    """Complete a layer that took its weight from a state dict, but not all that belongs to it.

    A weight without a gamma is that of a plain layer, whose scale is in the weight: gamma becomes
    sigma(W), so that the layer computes what the plain layer computed.

    Args:
        layer: the layer, after loading.
        given: names of the layer's own tensors that the state dict had.

    Raises:
        ValueError: if the weight is sharded.
    """
    if "weight" not in given or given.issuperset(SIGMA_TENSORS):
        return
    if isinstance(layer.weight, DTensor):
        missing = sorted(set(SIGMA_TENSORS) - given)
        raise ValueError(
            f"the state dict has the sharded weight of {layer.layer_name!r} but not its "
            f"{', '.join(missing)}; load plain weights before the model is sharded"
        )
    settle(layer)
    if "gamma" not in given:
        layer.gamma.copy_(layer.sigma)


def _version(weight: Tensor) -> int:
    # An inference tensor counts no versions: what changes it is noticed by `mark_moved` alone.
    return 0 if weight.is_inference() else weight._version

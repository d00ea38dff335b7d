"""Whether the singular triple of a sigma layer belongs to its weight, and making it so.

Optimizer steps are followed by `steps`. This is about every other way to change a weight: an
average of weights, a state dict of a plain model, an assignment.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_stable._ranks import whole_tensor
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.measures.leading import leading_triple
from hf_stable.methods.sigma_reparam.block_arithmetic import matrices_of, sigma_of

__all__ = [
    "SIGMA_TENSORS",
    "LayerWithTriple",
    "check_present",
    "mark_moved",
    "mark_settled",
    "settle",
    "settle_if_moved",
    "settle_loaded",
]

SIGMA_TENSORS = ("gamma", "sigma", "sigma_u", "sigma_v")
"""What a sigma layer has beside the tensors of the plain layer."""

TOLERANCE = 1e-5
"""A stored sigma this close to `u.T W v` (relative) is that of W: float32 rounds to about 1e-6."""

MOVED = -1


class LayerWithTriple(Protocol):
    """What a sigma layer has to have here and in `steps`; see `layers.SigmaLayer`."""

    layer_name: str
    block_dim: int
    serial_number: int
    settled_for: tuple[int, int]

    @property
    def num_blocks(self) -> int:
        """The number k of blocks with a sigma of their own."""

    @property
    def weight(self) -> Tensor:
        """The raw weight W."""

    @property
    def gamma(self) -> Tensor:
        """(k,) the learnable scale of each block."""

    @property
    def sigma(self) -> Tensor:
        """(k,) the value of `u.T W v` of each block."""

    @property
    def sigma_u(self) -> Tensor:
        """(k, m) left singular vectors."""

    @property
    def sigma_v(self) -> Tensor:
        """(k, n) right singular vectors."""


def mark_settled(layer: LayerWithTriple) -> None:
    """Note that the triple belongs to the weight as it is now."""
    weight = layer.weight
    layer.settled_for = (id(weight), _version(weight))


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


def settle_if_moved(layer: LayerWithTriple) -> None:
    """Settle a layer whose weight was changed in place by anything but an optimizer step.

    Two integers are compared; only where they differ are values looked at. Nothing is done for a
    weight that is not the layer's own (`functional_call`, what FSDP2 gathers for a forward), nor
    in compiled code.
    """
    if torch.compiler.is_compiling():
        return
    weight = layer.weight
    identity, version = layer.settled_for
    if identity == id(weight) and version != _version(weight):
        settle(layer)


@torch.no_grad()
def settle(layer: LayerWithTriple) -> None:
    """Set sigma, u and v from the weight, exactly, unless sigma is that of the weight already.

    A triple that a running training left in place is kept bit for bit, so looking moves nothing.
    Host synchronisation: yes. Every rank of a sharded weight has to call it.

    Raises:
        UnsupportedModelError: as `check_present` does.
    """
    check_present(layer)
    weight: Any = layer.weight
    whole = whole_tensor(weight).to(layer.sigma.device)  # an offloaded shard is on the CPU
    with torch.autocast(whole.device.type, enabled=False):
        now = sigma_of(whole, layer.sigma_u, layer.sigma_v, layer.block_dim)
    if not torch.allclose(now, layer.sigma, rtol=TOLERANCE, atol=0, equal_nan=True):
        for row, block in enumerate(matrices_of(whole, layer.num_blocks, layer.block_dim)):
            if torch.isfinite(now[row]):
                triple = leading_triple(block)
                layer.sigma[row], layer.sigma_u[row], layer.sigma_v[row] = triple
            else:  # the vectors stay, as in `steps`
                layer.sigma[row] = now[row]
    mark_settled(layer)


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

"""Turning sigma layers back into plain ones in place.

Where ranks share a weight, what a rank does by itself lies between collectives of all of them. So
they fail together, and what undoes a fold is the same on each.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from hf_stable._ranks import failing_together, gathered, is_divided, local_tensor, whole_tensor
from hf_stable.measures.matrices import spread_values
from hf_stable.methods.sigma_reparam.class_swapping import swap_class
from hf_stable.methods.sigma_reparam.folded_gammas import note_folded
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.stacks import SigmaStack, take_stack_out
from hf_stable.methods.sigma_reparam.steps import follow, forget
from hf_stable.methods.sigma_reparam.triples import settle
from hf_stable.methods.undoing import Undo, keep_attributes

__all__ = ["fold_layer"]

_OWN_ATTRIBUTES = (
    "parts",
    "power_iterations",
    "plain_class",
    "layer_name",
    "serial_number",
    "settled_for",
    "seen_entries",
)


def fold_layer(layer: SigmaLayer, undo: Undo | None = None) -> nn.Module:
    """Turn a sigma layer into the plain layer that computes the same, in place.

    `weight` keeps its identity, so optimizers, adapters and sharding that hold it go on.

    Args:
        layer: the layer.
        undo: what to call if something fails later; see `undoing`. It holds the raw weight, on the
            CPU, where there is room. Without one nothing is kept: of a copy that nobody else has.

    Returns:
        The layer; of experts in one parameter, the module that has it again.

    Raises:
        UnsupportedModelError: if the weight is offloaded.
        RuntimeError: if another rank that shares the weight has failed.
    """
    settle(layer)
    is_shared = is_divided(layer.weight)
    undo = _fold_weight(layer, undo)
    with failing_together(is_shared):
        return _take_out(layer, undo)


def _take_out(layer: SigmaLayer, undo: Undo) -> nn.Module:
    """Put the plain layer in the place of one whose weight is folded."""
    note_folded(layer.gamma)
    if isinstance(layer, SigmaStack):
        undo.append(keep_attributes(layer.holder))
        plain = take_stack_out(layer, undo)
    else:
        plain_class = layer.plain_class
        for name in (*layer.sigma_tensors, *_OWN_ATTRIBUTES):
            delattr(layer, name)
        swap_class(layer, plain_class, undo)
        plain = layer
    forget(layer)
    return plain


@torch.no_grad()
def _fold_weight(layer: SigmaLayer, undo: Undo | None) -> Undo:
    """Fold the weight alone, and return what undoes it besides what was to be undone."""
    is_shared = is_divided(layer.weight)
    with gathered(layer.weight, written=True):
        weight, gamma = local_tensor(layer.weight), whole_tensor(layer.gamma)
        with failing_together(is_shared):
            folded = _local_effective_weight(layer, gamma)
            raw = None if undo is None else weight.to("cpu", copy=True)
        if undo is None or raw is None:
            undo = []
        else:
            undo += [keep_attributes(layer), partial(follow, layer)]
            undo.append(partial(_write, layer.weight, raw))
        weight.copy_(folded)
    return undo


@torch.no_grad()
def _write(weight: Tensor, values: Tensor) -> None:
    with gathered(weight, written=True):
        local_tensor(weight).copy_(values)


def _local_effective_weight(layer: SigmaLayer, gamma: Tensor) -> Tensor:
    """Return `gamma / sigma * W`, rounded once, of the rows that this process holds."""
    weight = layer.weight
    sigma = layer.sigma.to(gamma.device)  # gamma and the weight may be offloaded
    scale = spread_values(gamma / sigma, weight, layer.parts)
    weight = local_tensor(weight)
    return (weight.to(scale.dtype) * scale).to(weight.dtype)

"""Turning plain layers into sigma layers in place: prepare, install. `folding` turns them back.

`prepare` computes everything and touches nothing, so that a patch can fail before it has begun.
The layer stays the same object, also to what has taken hold of its `forward`: accelerate's hooks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_stable._ranks import failing_together, is_divided, whole_shape, whole_tensor
from hf_stable.architectures.registry import UnsupportedModelError, is_plain_linear
from hf_stable.measures.leading import leading_triple
from hf_stable.measures.matrices import local_matrices
from hf_stable.measures.matrix_shards import is_shared
from hf_stable.measures.parts import WHOLE, Parts
from hf_stable.methods.sigma_reparam.class_swapping import cell_of_forward, swap_class
from hf_stable.methods.sigma_reparam.layers import (
    SigmaConv1D,
    SigmaConv1d,
    SigmaConv2d,
    SigmaConv3d,
    SigmaLayer,
    SigmaLinear,
)
from hf_stable.methods.sigma_reparam.part_arithmetic import as_rows
from hf_stable.methods.sigma_reparam.stacks import put_stack
from hf_stable.methods.sigma_reparam.steps import follow, forget
from hf_stable.methods.sigma_reparam.stored_parts import PARTS_TENSOR, as_tensor
from hf_stable.methods.sigma_reparam.triples import check_own, mark_settled
from hf_stable.methods.undoing import Undo, keep_attributes

__all__ = [
    "SigmaState",
    "check_plain",
    "install",
    "prepare",
    "sigma_class_of",
]

_ALIGNMENT = 64  # bytes, of what torch allocates

SIGMA_CLASSES: dict[type, type] = {
    nn.Linear: SigmaLinear,
    Conv1D: SigmaConv1D,
    nn.Conv1d: SigmaConv1d,
    nn.Conv2d: SigmaConv2d,
    nn.Conv3d: SigmaConv3d,
}


@dataclass(frozen=True)
class SigmaState:
    """What `install` adds to a plain layer; computed by `prepare`, which changes nothing."""

    gamma: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor
    parts: Parts
    name: str
    power_iterations: int = 1
    parameter: str = "weight"


def sigma_class_of(plain: type) -> type[SigmaLayer] | None:
    """Return the sigma class of a plain one, which a subclass is where an entry declares it."""
    if plain not in SIGMA_CLASSES and is_plain_linear(plain):
        return SigmaLinear
    return SIGMA_CLASSES.get(plain)


def check_plain(layer: nn.Module, name: str = "", parameter: str = "weight") -> None:
    """Raise for a layer that cannot become a sigma layer, or a module whose parameter cannot.

    Args:
        layer: the layer; of experts in one parameter, the module that has it.
        name: qualified name for messages.
        parameter: attribute that is the weight. Any but "weight" may be of a module of any class:
            that one's own forward finds the effective weight in its place.

    Raises:
        TypeError: if it is no `Linear`, `Conv1D` or convolution, nor declared to be plain.
        UnsupportedModelError: if its weight is elsewhere (offloaded) or computed from others
            (pruned, `weight_norm`), or its `forward` is not its own and would go on computing
            with the raw weight.
    """
    if parameter == "weight" and sigma_class_of(type(layer)) is None:
        raise TypeError(
            f"cannot reparametrise {name or 'a layer'} of type {type(layer).__module__}."
            f"{type(layer).__qualname__}; allowed are exactly Linear, Conv1D and "
            "Conv1d to Conv3d (a subclass, a quantised layer or an adapter may use its weight in "
            "ways that gamma / sigma would break; an entry declares one that does not by "
            "plain_layers). To patch the others, exclude it"
        )
    check_own(layer, name, parameter)
    if _weight(layer, parameter).is_meta:
        raise UnsupportedModelError(
            f"the weight of {name or 'a layer'} is on the meta device: it was not loaded, or "
            "accelerate keeps it on the CPU or on disk between forwards. Load the model without "
            "offloading (a device_map over devices that hold it all)"
        )
    held = layer.__dict__.get("forward")
    inner = layer.__dict__.get("_old_forward") if hasattr(layer, "_hf_hook") else held
    followed = inner == MethodType(type(layer).forward, layer) or cell_of_forward(layer)
    if held is not None and not followed:
        raise UnsupportedModelError(
            f"something has replaced the forward of {name!r} by {held!r}, which would "
            "go on using the raw weight. Take it off, call hf_stable.patch, then put it on again; "
            "accelerate's hooks and transformers' tensor parallelism alone are followed"
        )


def prepare(
    layer: nn.Module,
    *,
    parts: Parts = WHOLE,
    init: Literal["spectral", "one"] = "spectral",
    name: str = "",
    parameter: str = "weight",
) -> SigmaState:
    """Compute the exact singular triples of a plain layer without touching it.

    Args:
        layer: exactly an `nn.Linear`, a `Conv1D` or a convolution, or declared to be plain; of
            experts in one parameter, the module that has it.
        parts: where the parts of its weight lie that have a sigma of their own.
        init: `"spectral"` sets gamma to sigma, which leaves the layer's function as it is;
            `"one"` sets gamma to 1 (the paper's text).
        name: qualified name for messages.
        parameter: attribute of the layer that is the weight.

    Raises:
        TypeError: if the layer is of any other type, a subclass included.
        UnsupportedModelError: as `check_plain` does.
        ValueError: if a part is zero or not finite.
    """
    check_plain(layer, name, parameter)
    weight = _weight(layer, parameter)
    if parameter == "weight":
        parts = replace(parts, dim=1 if type(layer) is Conv1D else 0)
    if isinstance(weight, DTensor) and is_shared(weight) and not parts.is_whole:
        what = "experts in one parameter" if parts.stacked else "a fused projection"
        raise UnsupportedModelError(
            f"{name or 'a layer'} is {what}, and tensor parallelism has cut it: in "
            "evaluation transformers hands the layer a part of the weight without saying which. "
            "Give it one gamma for the whole matrix (fused_qkv='joint') or exclude it"
        )
    whole, triples = whole_tensor(weight).detach(), []
    with failing_together(is_divided(weight)):
        for matrix in local_matrices(whole, parts):
            try:
                triples.append(leading_triple(matrix))
            except ValueError as error:
                raise ValueError(f"cannot reparametrise {name or 'a layer'}: {error}") from error
    sigma = torch.stack([triple.sigma for triple in triples])
    u, v = as_rows([triple.u for triple in triples]), as_rows([triple.v for triple in triples])
    if not (sigma > 0).all():
        raise ValueError(
            f"cannot reparametrise {name or 'a layer'}: its {tuple(whole_shape(weight))} weight "
            "has an all-zero part, so gamma / sigma is 0 / 0; initialise it or exclude the layer"
        )
    gamma = sigma.clone() if init == "spectral" else torch.ones_like(sigma)
    return SigmaState(gamma, sigma, u, v, parts, name, parameter=parameter)


def install(module: nn.Module, state: SigmaState, undo: Undo) -> SigmaLayer:
    """Turn a plain layer into a sigma layer in place: same object, same `weight`, new class.

    Args:
        module: as it was given to `prepare`.
        state: what came back.
        undo: what to call if something fails later; see `undoing`.

    Returns:
        The layer; in the place of a parameter a new one, which has the parameter.
    """
    undo.append(keep_attributes(module))
    if state.parameter != "weight":
        layer: SigmaLayer = put_stack(module, state.parameter, undo)
    else:
        plain_class, sigma_class = type(module), sigma_class_of(type(module))
        assert sigma_class is not None  # `prepare` has checked it
        swap_class(module, sigma_class, undo)
        assert isinstance(module, SigmaLayer)
        layer = module
        layer.plain_class = plain_class
    gamma = nn.Parameter(state.gamma.clone(), requires_grad=layer.weight.requires_grad)
    if not is_divided(layer.weight) and layer.weight.data_ptr() % _ALIGNMENT:
        # It lies as safetensors found it in the file. Products with vectors round otherwise there,
        # and a run would depend on whether its weights were just initialised or loaded.
        layer.weight.data = layer.weight.data.clone()
    layer.gamma = gamma
    layer.register_buffer("sigma", state.sigma)
    layer.register_buffer("sigma_u", state.u)
    layer.register_buffer("sigma_v", state.v)
    layer.parts = state.parts
    layer.power_iterations = state.power_iterations
    stored = as_tensor(state.parts)
    if stored is not None:
        layer.register_buffer(PARTS_TENSOR, stored.to(state.sigma.device))
    layer.layer_name = state.name
    undo.append(partial(forget, layer))
    follow(layer)
    mark_settled(layer)
    return layer


def _weight(layer: nn.Module, parameter: str) -> Tensor:
    return cast(Tensor, getattr(layer, parameter))

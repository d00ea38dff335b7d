"""Modules and parameters of a model by name: of a class, at a path, as a state dict calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hf_stable._ranks import whole_shape

__all__ = ["class_names", "has_path", "is_stack", "join", "modules_of_class", "named_modules",
           "owner_of", "plain_name", "state_dict_name", "weight_holder"]  # fmt: skip

CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module"
"""What torch puts into the names of modules for activation checkpointing (`checkpoint_wrapper`),
and takes out of state dicts."""

COMPILED = "_orig_mod"
"""What `torch.compile` puts into the names of modules and of their state dict alike."""


def state_dict_name(name: str) -> str:
    """Return what a state dict calls a module or parameter, for its name in the model.

    The two differ where torch has put a wrapper around a block for activation checkpointing.
    """
    if CHECKPOINT_WRAPPER not in name:
        return name
    return ".".join(part for part in name.split(".") if part != CHECKPOINT_WRAPPER)


def plain_name(name: str) -> str:
    """Return what the model that torch.compile wraps, or has wrapped in it, calls a tensor."""
    return ".".join(part for part in state_dict_name(name).split(".") if part != COMPILED)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by the names of the state dict, of which a wrapper's is its block's."""
    return {state_dict_name(name): module for name, module in model.named_modules()}


def class_names(module: nn.Module) -> list[str]:
    """Return the names of a module's class and of all its ancestors, the nearest first.

    Sharding and compilation swap in subclasses, so a class is known by the whole line.
    """
    return [cls.__name__ for cls in type(module).__mro__]


def modules_of_class(
    modules: Mapping[str, nn.Module], class_name: str
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of every module of a class, in the order of the model."""
    for name, module in modules.items():
        if class_name in class_names(module):
            yield name, module


def owner_of(module: nn.Module, path: str) -> tuple[Any, str] | None:
    """Return the module that holds what a dotted path leads to, and its name there.

    Returns:
        None where the path leads to neither a module nor a parameter.
    """
    *parents, name = path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent, None)
        if not isinstance(owner, nn.Module):
            return None
    return (
        (owner, name) if isinstance(getattr(owner, name, None), nn.Module | nn.Parameter) else None
    )


def has_path(module: nn.Module, path: str) -> bool:
    """Say whether a dotted path leads to a module or a parameter."""
    return owner_of(module, path) is not None


def is_stack(target: Any) -> bool:
    """Say whether what is at a path is experts in one: (n, out, in), or a layer that holds them."""
    if isinstance(target, nn.Parameter):
        return len(whole_shape(target)) == 3
    weight = getattr(target, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(target, nn.Conv1d):
        return False
    return len(whole_shape(weight)) == 3


def join(prefix: str, path: str) -> str:
    """Return the name of what is at a path in the module of a name; "" is the model itself."""
    return f"{prefix}.{path}" if prefix else path


def weight_holder(layer: nn.Module) -> nn.Module:
    """Return the module that keeps a layer's weight: the layer, or one that a wrapper has inside.

    PEFT's wrappers show the weight of the layer that they compute with.
    """
    weight = getattr(layer, "weight", None)
    if weight is None:
        return layer
    holders = (m for m in layer.modules() if any(p is weight for p in m.parameters(recurse=False)))
    return next(holders, layer)

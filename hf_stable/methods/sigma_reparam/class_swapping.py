"""Giving a module another class in place, whatever has taken hold of its `forward`."""

from __future__ import annotations

from functools import partial
from types import CellType, MethodType
from typing import Any

from torch import nn

from hf_stable.methods.undoing import Undo

__all__ = ["cell_of_forward", "swap_class"]

# accelerate calls the second from the first; its removal leaves the first behind.
_FORWARDS = ("forward", "_old_forward")
_TENSOR_PARALLELISM = "transformers.distributed.tensor_parallel"


def swap_class(module: nn.Module, new: type[Any], undo: Undo) -> None:
    """Give a module another class, also where its `forward` is held as the bound one of the old.

    Args:
        module: whose class it is.
        new: the class.
        undo: what puts back what `keep_attributes` does not know of.
    """
    held, forward = MethodType(type(module).forward, module), MethodType(new.forward, module)
    cell = cell_of_forward(module)
    module.__class__ = new
    for name in _FORWARDS:
        if module.__dict__.get(name) == held:
            module.__dict__[name] = forward
    if cell is not None:
        undo.append(partial(setattr, cell, "cell_contents", held))
        cell.cell_contents = forward


def cell_of_forward(module: nn.Module) -> CellType | None:
    """Return where transformers' tensor parallelism keeps the forward that it has wrapped.

    Its function places inputs and outputs and calls the layer's own forward, bound in its closure.
    """
    wrapper: Any = module.__dict__.get("forward")
    if getattr(wrapper, "__module__", None) != _TENSOR_PARALLELISM:
        return None
    held = MethodType(type(module).forward, module)
    return next((cell for cell in wrapper.__closure__ or () if cell.cell_contents == held), None)

"""Experts that are one parameter of three dimensions: a sigma layer in the place of the parameter.

Where a model keeps its experts as (n, out, in) there is no layer whose class could be swapped. The
parameter moves into a `SigmaStack` of its name, and the module that uses it becomes one of
`SigmaExperts`, whose forward is the plain one with effective weights where it looks for parameters.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_stable.methods.sigma_reparam.class_swapping import swap_class
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.undoing import Undo

__all__ = ["SigmaExperts", "SigmaStack", "put_stack", "take_stack_out"]


class SigmaStack(SigmaLayer):
    """A parameter of several matrices, each with a sigma and a gamma of its own.

    Attributes:
        holder: the module whose parameter it was, and whose child it is.
        parameter: its name there.
    """

    holder: nn.Module
    parameter: str

    def __init__(self, holder: nn.Module, parameter: str, weight: nn.Parameter) -> None:
        """Take a parameter over; `install` adds what else a sigma layer has."""
        super().__init__()
        self.weight = weight
        self.training = holder.training
        self.parameter = parameter
        self.__dict__["holder"] = holder  # no child of its own child

    @property
    def plain_place(self) -> tuple[nn.Module, str]:
        """The module and the name under which the plain model has the weight."""
        return self.holder, self.parameter

    def extra_repr(self) -> str:
        """Print the shape of the weight and the number of parts."""
        return f"{'x'.join(map(str, self.weight.shape))}, sigma_parts={self.num_parts}"


class SigmaExperts(nn.Module):
    """What a module becomes whose stacks of matrices are reparametrised.

    Attributes:
        plain_class: the class that it was and will be.
        own_order: the names of its parameters as the plain class has them, stacks among them. An
            optimizer's state knows parameters by their order, whichever stack came first.
    """

    plain_class: type[nn.Module]
    own_order: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain class's forward on effective weights, each stack's formed once."""
        return self.plain_class.forward(self._stand_in(), *args, **kwargs)

    def _stand_in(self) -> nn.Module:
        """Return a module of the plain class that shares all but the weights of the stacks."""
        stacks = _stacks_of(self)
        plain: Any = self.plain_class.__new__(self.plain_class)
        plain.__dict__.update(self.__dict__)
        weights = {name: stack.effective_weight() for name, stack in stacks.items()}
        # DeepSpeed ZeRO-3 puts a dict of its own here, which knows the module that it is of.
        plain.__dict__["_parameters"] = dict(self._parameters.items()) | weights
        children = {name: each for name, each in self._modules.items() if name not in stacks}
        plain.__dict__["_modules"] = children
        return plain

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # A plain state dict has the parameter where this one has a module.
        for name in _stacks_of(self):
            if prefix + name in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let deepcopy and pickle build the class, which is none of a file, from the plain one."""
        if type(self) is not sigma_experts_class(self.plain_class):
            return super().__reduce_ex__(protocol)
        return _new_experts, (self.plain_class,), self.__dict__


_classes: dict[type, type[SigmaExperts]] = {}


def sigma_experts_class(plain: type[nn.Module]) -> type[SigmaExperts]:
    """Return the class of modules of a plain class whose stacks are reparametrised."""
    if plain not in _classes:
        bases: tuple[Any, ...] = (SigmaExperts, plain)
        _classes[plain] = type(f"Sigma{plain.__name__}", bases, {"__module__": __name__})
    return _classes[plain]


def put_stack(holder: nn.Module, parameter: str, undo: Undo) -> SigmaStack:
    """Put a bare `SigmaStack` in the place of a parameter, and return it."""
    if not isinstance(holder, SigmaExperts):
        plain, names = type(holder), tuple(holder._parameters)
        swap_class(holder, sigma_experts_class(plain), undo)
        assert isinstance(holder, SigmaExperts)
        holder.plain_class, holder.own_order = plain, names
    weight = holder._parameters.pop(parameter)
    assert weight is not None
    layer = SigmaStack(holder, parameter, weight)
    holder._modules[parameter] = layer
    _put_in_order(holder._modules, holder.own_order)
    return layer


def take_stack_out(layer: SigmaStack, undo: Undo) -> nn.Module:
    """Put the parameter of a stack back in its place, and return the module that has it."""
    holder: Any = layer.holder
    del holder._modules[layer.parameter]
    holder._parameters[layer.parameter] = layer.weight
    _put_in_order(holder._parameters, holder.own_order)
    if not _stacks_of(holder):
        swap_class(holder, holder.plain_class, undo)
        del holder.plain_class, holder.own_order
    return holder


def _put_in_order(table: dict[str, Any], names: tuple[str, ...]) -> None:
    """Move those of these names to the end of a table, in their order."""
    for name in names:
        if name in table:
            table[name] = table.pop(name)


def _stacks_of(holder: nn.Module) -> dict[str, SigmaStack]:
    return {n: each for n, each in holder._modules.items() if isinstance(each, SigmaStack)}


def _new_experts(plain: type[nn.Module]) -> SigmaExperts:
    made = sigma_experts_class(plain)
    return made.__new__(made)

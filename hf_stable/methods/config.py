"""What every patch method's options share: checked choices, and plain data in both directions."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from torch import nn

from hf_stable._wording import nearest
from hf_stable.methods.undoing import Undo, keep_attributes

__all__ = [
    "CONFIGS_ATTRIBUTE",
    "MethodConfig",
    "folded_methods",
    "method_options",
    "remember_folded",
    "take_out_configs",
]

CONFIGS_ATTRIBUTE = "hf_stable_configs"
"""The attribute of a patched model that holds its configs."""

FOLDED_ATTRIBUTE = "hf_stable_folded"
"""The attribute of a folded model that says what it was trained with, for its card."""

Config = TypeVar("Config", bound="MethodConfig")


@dataclass(frozen=True)
class MethodConfig:
    """Options of a patch method, whose name in files and on command lines is `method`."""

    method: ClassVar[str]

    def __post_init__(self) -> None:
        """Refuse a choice that is not among those of its field."""
        for name, hint in get_type_hints(type(self)).items():
            allowed, given = get_args(hint), getattr(self, name)
            if get_origin(hint) is Literal and given not in allowed:
                raise ValueError(
                    f"{name}={given!r} is not allowed{nearest(given, allowed)}; choose one of "
                    f"{', '.join(map(repr, allowed))}"
                )

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Self:
        """Build a config from options by name (a file, a command line, a checkpoint).

        Raises:
            ValueError: for an unknown option, naming the nearest one.
        """
        if problem := cls._problem_with(options):
            raise ValueError(problem)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return asdict(self)

    @classmethod
    def _problem_with(cls, names: Iterable[str]) -> str:
        allowed = [field.name for field in fields(cls)]
        for name in names:
            if name not in allowed:
                return (
                    f"unknown option {name!r} of {cls.method}{nearest(name, allowed)}; its "
                    f"options are {', '.join(allowed)}"
                )
        return ""


@dataclass_transform(frozen_default=True)
def method_options(cls: type[Config]) -> type[Config]:
    """Make a frozen dataclass whose TypeError for an unknown option names the nearest one."""
    made: Any = dataclass(frozen=True)(cls)
    plain_init = made.__init__

    @functools.wraps(plain_init)
    def init(self: Config, *args: Any, **options: Any) -> None:
        if problem := made._problem_with(options):
            raise TypeError(problem)
        plain_init(self, *args, **options)

    made.__init__ = init
    return made


def remember_folded(model: nn.Module, kind: type | UnionType, undo: Undo) -> None:
    """Note on a model, and on parts of it, the configs of a kind that are about to be taken out.

    As texts: a folded model is a plain one, which has to unpickle without this package.

    Args:
        model: patched, or not.
        kind: class of the configs.
        undo: what to call if something fails later.
    """
    for module in model.modules():
        every: tuple[MethodConfig, ...] = vars(module).get(CONFIGS_ATTRIBUTE, ())
        if configs := [config for config in every if isinstance(config, kind)]:
            undo.append(keep_attributes(module))
            setattr(module, FOLDED_ATTRIBUTE, {config.method: str(config) for config in configs})


def folded_methods(model: nn.Module) -> dict[str, str]:
    """Return the methods that a plain model was folded from, and the text of their configs.

    Only of the model itself: an adapter on a folded one was trained without them.
    """
    return dict(vars(model).get(FOLDED_ATTRIBUTE, {}))


def take_out_configs(model: nn.Module, kind: type | UnionType, undo: Undo) -> None:
    """Take the configs of a kind of methods off a model and all that is in it.

    Args:
        model: patched, or not.
        kind: class of the configs.
        undo: what to call if something fails later.
    """
    for module in model.modules():
        configs = getattr(module, CONFIGS_ATTRIBUTE, ())
        left = tuple(config for config in configs if not isinstance(config, kind))
        if left != configs:
            undo.append(keep_attributes(module))
            setattr(module, CONFIGS_ATTRIBUTE, left)

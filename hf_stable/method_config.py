"""What every patch method's options share: checked choices, and plain data in both directions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

__all__ = ["CONFIGS_ATTRIBUTE", "MethodConfig", "nearest"]

CONFIGS_ATTRIBUTE = "hf_stable_configs"
"""The attribute of a patched model that holds its configs."""


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
        allowed = [field.name for field in fields(cls)]
        for name in options:
            if name not in allowed:
                raise ValueError(
                    f"unknown option {name!r} of {cls.method}{nearest(name, allowed)}; its "
                    f"options are {', '.join(allowed)}"
                )
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return asdict(self)


def nearest(given: object, allowed: Iterable[object]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed value, or nothing."""
    close = difflib.get_close_matches(str(given), [str(value) for value in allowed], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

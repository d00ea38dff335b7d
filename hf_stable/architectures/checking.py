"""Whether an entry is of the kinds that its fields ask for: told when it is registered."""

from __future__ import annotations

import dataclasses
import types
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["problem_with"]


def problem_with(entry: Any) -> str | None:
    """Say which field of an entry, or of what is in it, is not of its kind; None if all are.

    Args:
        entry: an `Architecture`, or what it consists of.
    """
    hints = _hints_of(entry.__class__)
    for each in dataclasses.fields(entry):
        value = getattr(entry, each.name)
        if not _fits(value, hints[each.name]):
            return f"{each.name} of {type(entry).__name__} is {value!r}, not {each.type}"
        for part in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(part) and (problem := problem_with(part)):
                return problem
    return None


@cache
def _hints_of(kind: type) -> dict[str, Any]:
    """Return the kinds of a class's fields, read once: every shipped entry is checked on import."""
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_fits(part, arguments[0]) for part in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return hint is object or isinstance(value, hint)

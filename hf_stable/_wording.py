"""Words that errors share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["missing_package", "nearest"]


def nearest(given: object, allowed: Iterable[object]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed value, or nothing."""
    names = {str(value).lower(): str(value) for value in allowed}
    close = difflib.get_close_matches(str(given).lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def missing_package(name: str, *, needed_by: str, extra: str) -> ModuleNotFoundError:
    """Return the error for a package that is not installed: who needs it and how to get it."""
    return ModuleNotFoundError(
        f"{needed_by} needs {name}, which comes with the {extra} extra: "
        f'pip install "hf-stable[{extra}]"',
        name=name,
    )

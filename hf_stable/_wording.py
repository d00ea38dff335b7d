"""Words that errors share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["extra_needed", "nearest"]


def nearest(given: object, allowed: Iterable[object]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed value, or nothing."""
    names = {str(value).lower(): str(value) for value in allowed}
    close = difflib.get_close_matches(str(given).lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def extra_needed(what: str, extra: str, missing: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error of something that needs a package of one of our extras.

    Args:
        what: needs it, such as "the page".
        extra: brings it.
        missing: the error of its import.
    """
    package = (missing.name or "a package").split(".")[0]
    return ModuleNotFoundError(
        f"{what} needs {package}, which comes with the {extra} extra: "
        f'pip install "hf-stable[{extra}]"',
        name=package,
    )

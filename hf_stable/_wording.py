"""Words that errors share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(given: object, allowed: Iterable[object]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed value, or nothing."""
    names = {str(value).lower(): str(value) for value in allowed}
    close = difflib.get_close_matches(str(given).lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""

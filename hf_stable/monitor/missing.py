"""What could not be measured, and why: a missing value ends no training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Missing", "reason_of"]


class Missing:
    """The measures of a step that could not be taken; each is warned of the first time.

    Attributes:
        reasons: what could not be measured -> why, since `clear`.
    """

    def __init__(self) -> None:
        """Begin with nothing missing."""
        self.reasons: dict[str, str] = {}
        self._told: set[str] = set()

    def clear(self) -> None:
        """Begin a step; what was warned of once stays so."""
        self.reasons = {}

    @contextmanager
    def bearing(self, what: str) -> Iterator[None]:
        """Turn an error within the block into a missing value and a warning."""
        try:
            yield
        except Exception as error:
            self.reasons[what] = reason_of(error)
            if what not in self._told:
                self._told.add(what)
                warnings.warn(
                    f"{what} could not be measured ({self.reasons[what]}): the value is missing, "
                    "training goes on",
                    UserWarning,
                    stacklevel=4,
                )


def reason_of(error: Exception) -> str:
    """Return an error as one short line."""
    name, text = type(error).__name__.lstrip("_"), " ".join(str(error).split())
    return f"{name}: {text[:160]}" if text else name

"""Changes to libraries that may be imported after hf_stable: made when they are there at last.

A training engine (DeepSpeed) is often imported after the model is patched. What has to follow it
asks here before it relies on the changes.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["ask_for_late_changes", "make_late_changes"]

_makers: list[Callable[[], None]] = []


def ask_for_late_changes(maker: Callable[[], None]) -> None:
    """Have a function called whenever changes may have become possible; it has to be cheap."""
    if maker not in _makers:
        _makers.append(maker)


def make_late_changes() -> None:
    """Make the changes that have become possible since the last call."""
    for maker in _makers:
        maker()

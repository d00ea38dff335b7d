"""Windows of rates that train: how wide they are, what cut them off, which of two is wider."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Window", "decades", "is_wider", "window_text"]

Window = tuple[float, float] | None
"""Lowest and highest rate; None where no rate counts."""

WIDER = 1.1
"""Width in decades beyond which, times another, a window counts as wider than that."""


def decades(found: Window) -> float:
    """Return how wide a window is, zero where there is none."""
    return 0.0 if found is None else math.log10(found[1] / found[0])


def is_wider(first: Window, second: Window, rates: Sequence[float]) -> bool:
    """Return whether one window is surely wider than another, by more than 10 % in decades.

    What is seen of a window that was cut off is the least that it may have: such a one can be wider
    than others by what is seen, and no other can be called wider than it, even if that was cut off
    as well. A window is wider than none.
    """
    if second is None:
        return first is not None
    return not _cut_off(second, rates) and decades(first) > WIDER * decades(second)


def window_text(found: Window, rates: Sequence[float]) -> str:
    """Return the width of a window as a factor, and on which sides the rates ended before it."""
    if found is None:
        return "none"
    low, high = found
    cut = _cut_off(found, rates)
    times = high / low
    width = f"{times:.0f}" if times >= 100 else f"{times:.2g}"
    return f"{width} x" + (f" (cut off {' and '.join(cut)})" if cut else "")


def _cut_off(found: Window, rates: Sequence[float]) -> list[str]:
    """Return the sides on which a window goes on beyond the rates that were tried."""
    if found is None:
        return []
    return ["below"] * (found[0] == rates[0]) + ["above"] * (found[1] == rates[-1])

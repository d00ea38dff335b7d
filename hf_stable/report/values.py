"""Values of records, as a damaged file may hold them: whatever is no number becomes NaN or None."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any, TypeVar

from hf_stable.monitor.terms import find_term

__all__ = ["curve_points", "evenly", "to_number", "to_step", "to_text", "worst_head"]

Item = TypeVar("Item")

MOST_SIZES = 32
"""Entries of a `sec_curve` that a head can have: it is of sizes up to its dimension."""

MOST_CHARACTERS = 1000
"""Characters of a text; a longer one is cut, since it says nothing more and may be of any size."""

NOT_SHOWN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Kinds of characters that move a cursor, turn text around, or are none."""


def worst_head(quantity: str, value: Any) -> tuple[float, int | None]:
    """Return the worst head's value (lowest for entropy and ranks, else highest) and its number.

    Args:
        quantity: name of the quantity.
        value: list per head, a number of the whole layer, or anything a damaged file may hold.

    Returns:
        NaN and None where no head has a finite value; None also for a number of the whole layer.
    """
    if not isinstance(value, list):
        return to_number(value), None
    finite = [(number, i) for i, v in enumerate(value) if math.isfinite(number := to_number(v))]
    if not finite:
        return math.nan, None
    return min(finite) if find_term(quantity).low_is_bad else max(finite)


def curve_points(value: Any) -> list[tuple[int, float]]:
    """Return (s, SEC(d_q, s)) of a recorded `sec_curve`; none of anything else a file may hold."""
    entries = value if isinstance(value, list) else []
    return [(2**i, to_number(entry)) for i, entry in enumerate(entries[:MOST_SIZES])]


def to_number(value: Any) -> float:
    """Return a number, also one that was written as text; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def to_step(value: Any) -> int | None:
    """Return a step, or another count, as an integer; None for what is none."""
    number = math.nan if isinstance(value, str) else to_number(value)
    # Beyond 2**53 a float is no longer exact: no run is as long.
    return int(number) if 0 <= number <= 2**53 else None


def to_text(value: Any) -> str:
    """Return a text that any file, page and terminal can take; "" for what is none.

    What moves a terminal's cursor, turns text around or stands for half a character is replaced by
    U+FFFD, the sign for what cannot be shown.
    """
    if not isinstance(value, str):
        return ""
    if value.isascii() and value.isprintable() and len(value) <= MOST_CHARACTERS:
        return value
    cut = value if len(value) <= MOST_CHARACTERS else f"{value[:MOST_CHARACTERS]}\u2026"
    return "".join(
        " " if c in "\t\n\r" else "\ufffd" if unicodedata.category(c) in NOT_SHOWN else c
        for c in cut
    )


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return so many items, two or more, from the first to the last; all if they are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]

"""JSON as any parser reads it: it has no number for NaN and infinity, so both are written as null.

Every file that this package writes is written through `to_json`, so that what is not finite has
one spelling; `from_json` reads it, and what older files and other programs have in its place.
"""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["as_json_value", "from_json", "to_json"]


def as_json_value(value: Any) -> Any:
    """Return plain data with None for each NaN and infinite number, and lists for tuples."""
    if isinstance(value, dict):
        return {key: as_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(content: Any, **layout: Any) -> str:
    """Return plain data as strict JSON, with null for each NaN and infinite number.

    Args:
        content: what `json.dumps` takes.
        layout: of its options, such as `indent` and `separators`.
    """
    return json.dumps(as_json_value(content), allow_nan=False, **layout)


def from_json(text: str) -> Any:
    """Read JSON; `NaN`, `Infinity` and numbers too large for a float are None, as null is.

    Raises:
        ValueError: for what is no JSON, is nested too deep or has an integer of too many digits.
    """
    try:
        return json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None

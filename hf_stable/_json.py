"""Plain data for JSON, which has no number for NaN and infinity."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["as_json_value"]


def as_json_value(value: Any) -> Any:
    """Return plain data with None for each NaN and infinite number, and lists for tuples."""
    if isinstance(value, dict):
        return {key: as_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

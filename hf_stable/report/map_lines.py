"""Attention maps within the lines of `stability.jsonl`: left out as text, parsed where wanted.

Maps are nearly all of a log that has them, and a report shows a few of them.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from hf_stable.report.run_records import AttentionMap
from hf_stable.report.values import to_number, to_text

__all__ = ["CUT", "cut_maps", "parse_map", "read_maps"]

CUT = "cut"
"""What stands in a line in place of its maps."""

TINY = 1e-300

# Layers' names and lists of numbers have no braces, so the first one closed is the maps' own. In a
# text the quotes would have backslashes.
_MAPS = re.compile(rb'(?<!\\)"maps"\s*:\s*(\{[^{}]+\})')


def cut_maps(line: bytes) -> bytes:
    """Return a line of the log with a string in place of its maps, which are not parsed."""
    return _MAPS.sub(b'"maps":"cut"', line, count=1)


def read_maps(log: Path, offset: int) -> dict[str, list[Any]]:
    """Parse the maps of the line that begins at an offset.

    Returns:
        The maps of the recorded heads by layer, each as it was written; empty if they are damaged.
    """
    try:
        with log.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        found = _MAPS.search(line)
        content = json.loads(found[1] if found else line)
        by_layer = content if found else content["quantities"]["maps"]
        return {to_text(layer): maps for layer, maps in by_layer.items() if isinstance(maps, list)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def parse_map(rows: Any) -> AttentionMap | None:
    """Return a map in 256 levels, or None for one that is damaged or not finite."""
    if not isinstance(rows, list) or not all(isinstance(r, list) for r in rows):
        return None
    entries = [to_number(entry) for row in rows for entry in row]
    if len(entries) != len(rows) ** 2 or not entries or not all(map(math.isfinite, entries)):
        return None
    largest = max(entries)
    # Of a tiny entry the scale would be infinite; such a map is nothing everywhere.
    scale = 255 / largest if largest > TINY else 0.0
    levels = bytes(max(0, round(entry * scale)) for entry in entries)
    return AttentionMap(len(rows), levels, largest)

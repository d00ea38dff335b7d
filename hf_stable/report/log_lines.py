"""Read `stability.jsonl` line by line: what can be read of each is kept, the rest is said."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hf_stable.monitor.log_file import FILE_NAME
from hf_stable.monitor.terms import find_term
from hf_stable.report.events import EVENTS, KEPT, Event, KeptFiles, read_event, read_kept
from hf_stable.report.map_lines import CUT, cut_maps
from hf_stable.report.run_records import Probe
from hf_stable.report.values import to_number, to_step, to_text

__all__ = ["GrowingLog", "LoggedRun", "read_log_lines"]

LONGEST_LINE = 1 << 28
"""Bytes of a line; one that is longer is not that of a probe, and would fill the memory."""


@dataclass
class LoggedRun:
    """What a log holds.

    Attributes:
        probes: in the order of the file.
        events: likewise.
        batches: what was kept at alarms, likewise.
        damaged_lines: how many lines could not be read.
        damaged_fields: how many fields of other lines are not what belongs there.
        first_damage: where the first of these is.
    """

    probes: list[Probe] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    batches: list[KeptFiles] = field(default_factory=list)
    damaged_lines: int = 0
    damaged_fields: int = 0
    first_damage: str = ""

    def note(self, what: str, step: int) -> None:
        """Count a damaged field."""
        self.damaged_fields += 1
        self.first_damage = self.first_damage or f"{what} at step {step}"

    def notes(self, last: int | None) -> list[str]:
        """Return in sentences what could not be read.

        Args:
            last: the step up to which was read; None for all.
        """
        said = []
        if self.damaged_lines:
            lines = "1 line" if self.damaged_lines == 1 else f"{self.damaged_lines} lines"
            said.append(f"{lines} of {FILE_NAME} could not be read and were left out.")
        if self.damaged_fields:
            count = self.damaged_fields
            values = "1 value" if count == 1 else f"{count} values"
            said.append(
                f"{values} in {FILE_NAME} were not of the kind that belongs there and were left "
                f"out, first {self.first_damage}."
            )
        if not self.probes:
            until = "" if last is None else f" up to step {last}"
            said.append(f"{FILE_NAME} holds no probe{until}.")
        return said


def read_log_lines(path: Path, last: int | None) -> LoggedRun:
    """Read a log line by line, up to a step: with its maps it may be larger than memory.

    Args:
        path: of the log.
        last: the step up to which it is read; None for all.

    Raises:
        OSError: if the file cannot be read.
    """
    found, offset = LoggedRun(), 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            begin, offset = offset, offset + len(line)
            if line.strip():
                _take(found, line, begin, last)
    return found


class GrowingLog:
    """A log that is read again and again while a training appends to it: each line once.

    A line without an end is one that the training is at, and is left for the next time. Where the
    file is another one (a resume has rewritten it), or shorter, all of it is read anew.

    Args:
        path: of the log, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        """Read nothing yet."""
        self.path = path
        self.found = LoggedRun()
        self._end, self._inode = 0, -1

    def read(self) -> LoggedRun:
        """Return all that the log holds by now.

        Raises:
            OSError: if the file is there and cannot be read.
        """
        if not self.path.is_file():
            self.found, self._end, self._inode = LoggedRun(), 0, -1
            return self.found
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._end:
                self.found, self._end, self._inode = LoggedRun(), 0, status.st_ino
            file.seek(self._end)
            while (line := file.readline(LONGEST_LINE)).endswith(b"\n") or (
                len(line) == LONGEST_LINE  # a piece of what is no line of a probe
            ):
                if line.strip():
                    _take(self.found, line, self._end, None)
                self._end += len(line)
        return self.found


def _take(found: LoggedRun, line: bytes, begin: int, last: int | None) -> None:
    content = _parse(cut_maps(line))
    attempt, step = to_step(content.get("attempt")), to_step(content.get("step"))
    event = content.get("event")
    if attempt is None or step is None or event not in ("probe", KEPT, *EVENTS):
        found.damaged_lines += 1
    elif last is not None and step > last:
        return
    elif event == "probe":
        found.probes.append(_probe(attempt, step, begin, content, found))
    elif event == KEPT:
        found.batches.append(read_kept(step, content))
    else:
        read, damaged = read_event(event, attempt, step, content)
        found.events.append(read)
        for name in damaged:
            found.note(f"{name} of an event", step)


def _parse(line: bytes) -> dict[str, Any]:
    """Return a line's object; an empty one where it is damaged."""
    try:
        content = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _probe(
    attempt: int, step: int, offset: int, content: Mapping[str, Any], found: LoggedRun
) -> Probe:
    written = _object(content, "quantities", step, found)
    quantities = {
        to_text(name): _quantity(name, by_layer, step, found)
        for name, by_layer in written.items()
        if name != "maps"
    }
    numbers = {
        to_text(key): to_number(value)
        for key, value in content.items()
        if key not in ("step", "attempt", "loss")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }
    loss = _number(content["loss"]) if "loss" in content else None
    if loss is None and "loss" in content:
        found.note("loss", step)
    maps = written.get("maps")
    if maps and maps != CUT and not isinstance(maps, dict):
        found.note("maps", step)
    return Probe(
        attempt=attempt,
        step=step,
        loss=loss,
        maps_at=offset if maps == CUT or (maps and isinstance(maps, dict)) else None,
        quantities={name: by_layer for name, by_layer in quantities.items() if by_layer},
        rates=_quantity("effective_lr", _object(content, "effective_lr", step, found), step, found),
        numbers=numbers,
    )


def _object(content: Mapping[str, Any], key: str, step: int, found: LoggedRun) -> dict[str, Any]:
    value = content.get(key, {})
    if isinstance(value, dict):
        return value
    found.note(key, step)
    return {}


def _quantity(name: str, by_layer: Any, step: int, found: LoggedRun) -> dict[str, Any]:
    """Return what belongs to a quantity: by layer a number, or a list of numbers or texts."""
    if not isinstance(by_layer, dict):
        found.note(to_text(name), step)
        return {}
    is_mode = find_term(name).per == "mode"
    kept = {}
    for layer, value in by_layer.items():
        whole = _modes(value) if is_mode else _numbers(value)
        if whole is None:
            found.note(f"{to_text(name)} of {to_text(layer)}", step)
        else:
            kept[_name(layer)] = whole
    return kept


# Every probe names the same layers.
_name = lru_cache(1 << 16)(to_text)


def _modes(value: Any) -> list[str] | None:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        return None
    return [to_text(entry) for entry in value]


def _numbers(value: Any) -> float | list[float] | None:
    """Return a number, or one for each head; NaN for what is not finite, None for anything else.

    Logs of before 0.1.0 may have numbers as texts.
    """
    if type(value) is float:
        return value
    if not isinstance(value, list):
        return _number(value)
    if all(type(entry) is float for entry in value):
        return value
    numbers = [_number(entry) for entry in value]
    return None if None in numbers else [number for number in numbers if number is not None]


def _number(value: Any) -> float | None:
    if value is None:
        return math.nan
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer that no float can hold
        return math.nan
    except ValueError:
        return None

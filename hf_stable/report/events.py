"""What a monitor did: alarms, rollbacks, stops; read from its log, and told in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_stable.report.values import to_number, to_step, to_text

__all__ = [
    "EVENTS",
    "KEPT",
    "Event",
    "KeptFiles",
    "describe_event",
    "read_event",
    "read_kept",
    "some_events",
]

EVENTS = ("alarm", "rollback", "skip", "stop", "end")
"""The lines of `stability.jsonl` that are no probes."""

KEPT = "batches"
"""And that of what was kept at an alarm."""

MOST_EVENTS = 60
"""Events of a run that a page lists."""

MOST_FILES = 1024
"""Files of an alarm that are looked at."""


@dataclass(frozen=True)
class Event:
    """An `alarm`, `rollback`, `skip`, `stop` or `end` line of `stability.jsonl`.

    Attributes:
        name: which of them.
        attempt: how many rollbacks came before.
        step: optimizer step.
        kind: of an alarm: "collapse", "spike" or "nonfinite", "unknown" if the file does not say.
        layer: where an alarm found most, or "".
        head: likewise, or None.
        quantity: what it compared.
        value: what that was.
        threshold: what it was compared with.
        reason: one sentence.
        advice: of an alarm.
        to_step: where a rollback went, or None.
        lr_scale: what the rates were multiplied by since the beginning.
        seconds: of the leg of training that an `end` line ends.
        skips: steps whose batches are skipped after a rollback.
    """

    name: str
    attempt: int
    step: int
    kind: str = ""
    layer: str = ""
    head: int | None = None
    quantity: str = ""
    value: float = math.nan
    threshold: float = math.nan
    reason: str = ""
    advice: str = ""
    to_step: int | None = None
    lr_scale: float = math.nan
    seconds: float = math.nan
    skips: tuple[int, ...] = ()


@dataclass(frozen=True)
class KeptFiles:
    """A `batches` line of `stability.jsonl`: the files that an alarm led to.

    Attributes:
        step: optimizer step of the alarm.
        kind: of the alarm.
        steps: whose batches are suspicious.
        files: names in the folder of batches, as the line has them.
        left_out: micro-batches for which there was no room.
    """

    step: int
    kind: str
    steps: tuple[int, ...]
    files: tuple[str, ...]
    left_out: int


TEXTS = ("kind", "layer", "quantity", "reason", "advice")
COUNTS = ("head", "to_step")
NUMBERS = ("value", "threshold", "lr_scale", "seconds")


def read_event(
    name: str, attempt: int, step: int, content: Mapping[str, Any]
) -> tuple[Event, list[str]]:
    """Return the event of a line, and the names of fields that are not what belongs there."""
    texts = {key: to_text(content.get(key)) for key in TEXTS}
    counts = {key: to_step(content.get(key)) for key in COUNTS}
    numbers = {key: to_number(content.get(key)) for key in NUMBERS}
    damaged = [
        key
        for key, value in content.items()
        if value is not None
        and (
            (key in TEXTS and not isinstance(value, str))
            or (key in COUNTS and counts[key] is None)
            or (key in NUMBERS and (isinstance(value, bool | list | dict)))
        )
    ]
    if name == "alarm":
        texts["kind"] = texts["kind"] or "unknown"
    fields: dict[str, Any] = {**texts, **counts, **numbers, "skips": _steps(content.get("skips"))}
    return Event(name, attempt, step, **fields), damaged


def read_kept(step: int, content: Mapping[str, Any]) -> KeptFiles:
    """Return what a line says was kept, as far as it is what belongs there."""
    files = content.get("files")
    names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    return KeptFiles(
        step,
        to_text(content.get("kind")) or "unknown",
        _steps(content.get("steps")),
        tuple(names[:MOST_FILES]),
        to_step(content.get("left_out")) or 0,
    )


def _steps(value: Any) -> tuple[int, ...]:
    found = map(to_step, value) if isinstance(value, list) else ()
    return tuple(step for step in found if step is not None)


def some_events(events: Sequence[Event]) -> tuple[Sequence[Event], int]:
    """Return the first and the last events, as many as a page lists, and how many are left out."""
    if len(events) <= MOST_EVENTS:
        return events, 0
    half = MOST_EVENTS // 2
    return [*events[:half], *events[-half:]], len(events) - MOST_EVENTS


def describe_event(event: Event) -> str:
    """Say in one sentence what an alarm found and advises, or what was done."""
    if event.name == "rollback":
        skips = f", without the batches of steps {', '.join(map(str, event.skips))}"
        back = f"went back to step {event.to_step}, rates times {event.lr_scale:.4g}"
        return back + (skips if event.skips else "")
    if event.name == "skip":
        return "its batches were skipped: weights stayed as they were"
    if event.name == "stop":
        return event.reason
    where = f"{event.layer}, " if event.layer else ""
    where += f"head {event.head}: " if event.head is not None else ""
    numbers = f" ({event.quantity} {event.value:.4g}, threshold {event.threshold:.4g})"
    return f"{where}{event.reason}{numbers}. To try: {event.advice}"

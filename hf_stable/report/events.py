"""What a monitor did: alarms, rollbacks, stops; read from its log, and told in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_stable.report.values import to_number, to_step, to_text

__all__ = ["EVENTS", "Event", "describe_event", "read_event"]

EVENTS = ("alarm", "rollback", "stop", "end")
"""The lines of `stability.jsonl` that are no probes."""


@dataclass(frozen=True)
class Event:
    """An `alarm`, `rollback`, `stop` or `end` line of `stability.jsonl`.

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
    fields: dict[str, Any] = {**texts, **counts, **numbers}
    return Event(name, attempt, step, **fields), damaged


def describe_event(event: Event) -> str:
    """Say in one sentence what an alarm found and advises, or what was done."""
    if event.name == "rollback":
        return f"went back to step {event.to_step}, rates times {event.lr_scale:.4g}"
    if event.name == "stop":
        return event.reason
    where = f"{event.layer}, " if event.layer else ""
    where += f"head {event.head}: " if event.head is not None else ""
    numbers = f" ({event.quantity} {event.value:.4g}, threshold {event.threshold:.4g})"
    return f"{where}{event.reason}{numbers}. To try: {event.advice}"

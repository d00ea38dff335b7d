"""Read the Trainer's `trainer_state.json`, of a run's folder or of the checkpoints in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_stable._file_names import TRAINER_STATE_FILE
from hf_stable.report.events import Event
from hf_stable.report.values import to_step, to_text

__all__ = [
    "checkpoint_step",
    "checkpoints_in",
    "damage_note",
    "dig",
    "history_of",
    "read_object",
    "read_state",
]

_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")

LARGEST_STATE = 1 << 30
"""Bytes of a file that is read at once."""


def checkpoint_step(name: str) -> int | None:
    """Return the step of a checkpoint's folder name; None for another name."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first."""
    found = [(step, child) for child in folder.iterdir()
             if (step := checkpoint_step(child.name)) is not None and child.is_dir()]  # fmt: skip
    return [child for _, child in sorted(found, reverse=True)]


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ValueError: if it holds none, is damaged, nested too deep or too large.
        OSError: if it cannot be read.
    """
    if not path.is_file() or path.stat().st_size > LARGEST_STATE:
        raise ValueError("too large, or no regular file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def read_state(
    folder: Path,
    events: Sequence[Event],
    notes: list[str],
    is_earlier: Callable[[Path, Mapping[str, Any]], bool],
) -> dict[str, Any]:
    """Return the Trainer state that has come furthest: the folder's own, or of a checkpoint.

    Damaged ones are noted, and an older checkpoint's is taken. Checkpoints of a way that a rollback
    has left are passed over, and so are those of an earlier run, which is noted.

    Args:
        folder: of a run, or a checkpoint.
        events: of its log.
        notes: what is missing or damaged is added to.
        is_earlier: says of a path and its state whether it is of an earlier run.
    """
    own = [path for path in [folder / TRAINER_STATE_FILE] if path.is_file()]
    paths = [
        path for child in checkpoints_in(folder) if (path := child / TRAINER_STATE_FILE).is_file()
    ]
    if not own and not paths:
        notes.append(f"There is no {TRAINER_STATE_FILE}: no evaluations, no time, few losses.")
    fitting = _fitting(paths, notes, is_earlier)
    whole = (state for state in fitting if not _was_left(state, events))
    states = [next(_fitting(own, notes, is_earlier), {}), next(whole, {})]
    return max(states, key=lambda state: to_step(state.get("global_step")) or 0)


def _fitting(
    paths: Sequence[Path],
    notes: list[str],
    is_earlier: Callable[[Path, Mapping[str, Any]], bool],
) -> Iterator[dict[str, Any]]:
    for path in paths:
        try:
            state = read_object(path)
            if is_earlier(path, state):
                name = to_text("/".join(path.parts[-2:]))
                notes.append(f"{name} is of an earlier run in this folder and was left out.")
            else:
                yield state
        except (OSError, ValueError) as error:
            notes.append(damage_note(path, error))


def damage_note(path: Path, error: Exception) -> str:
    """Say that a file could not be read."""
    problem = str(error) if type(error) is ValueError else type(error).__name__
    return f"{to_text('/'.join(path.parts[-2:]))} is damaged ({problem}) and was left out."


def _was_left(state: Mapping[str, Any], events: Sequence[Event]) -> bool:
    """Return whether a rollback went back to before a state, which is of an attempt before it."""
    step = to_step(state.get("global_step")) or 0
    monitor = dig(state, "stateful_callbacks", "StabilityCallback", "attributes", "progress")
    attempt = to_step(dig(monitor, "rollbacks").get("count")) or 0
    return any(
        event.name == "rollback"
        and event.attempt >= attempt
        and event.to_step is not None
        and event.to_step < step
        for event in events
    )


def history_of(state: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Any], ...]:
    """Return the Trainer's records that have a step: numbers and texts by their key."""
    records = state.get("log_history", [])
    if not isinstance(records, list):
        notes.append(f"log_history in {TRAINER_STATE_FILE} is no list: losses are missing.")
        return ()
    whole = [r for r in records if isinstance(r, dict) and to_step(r.get("step")) is not None]
    if len(whole) < len(records):
        notes.append(f"{len(records) - len(whole)} records in {TRAINER_STATE_FILE} have no step.")
    kept = [{to_text(k): v for k, v in r.items() if not isinstance(v, dict | list)} for r in whole]
    damaged = sum(len(r) for r in whole) - sum(len(r) for r in kept)
    if damaged:
        notes.append(f"{damaged} values in {TRAINER_STATE_FILE} are no numbers and were left out.")
    return tuple(record | {"step": to_step(record["step"])} for record in kept)


def dig(content: Any, *keys: str) -> dict[str, Any]:
    """Follow keys into nested objects; an empty one where the way ends."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}

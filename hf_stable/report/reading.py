"""Read what a training run left on disk: `trainer_state.json` and `stability.jsonl`.

Whatever is damaged, half-written or missing becomes a note; what can be read is kept.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_stable._file_names import TRAINER_STATE_FILE
from hf_stable.monitor.log_file import FILE_NAME
from hf_stable.report.map_lines import cut_maps
from hf_stable.report.run_records import Event, Probe, RunRecords
from hf_stable.report.values import to_number, to_step

__all__ = ["name_runs", "read_run", "read_runs"]


EVENTS = ("alarm", "rollback", "stop", "end")

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def read_runs(
    paths: Sequence[str | os.PathLike[str]],
    *,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> list[RunRecords]:
    """Read several runs and give each a name of its own.

    Args:
        paths: as for `read_run`.
        on_run: called with (runs done, runs in all) after each.

    Raises:
        FileNotFoundError: if one does not exist.
        ValueError: if one is no run at all.
    """
    runs = []
    for path, name in zip(paths, name_runs(paths), strict=True):
        runs.append(read_run(path, name))
        on_run(len(runs), len(paths))
    return runs


def read_run(path: str | os.PathLike[str], name: str | None = None) -> RunRecords:
    """Read what a run left behind.

    Args:
        path: the Trainer's output folder, or a checkpoint in it: then the run up to there.
        name: label; by default the folder's name.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has neither a Trainer state nor a stability log, nor a checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist or is no folder; give the output_dir of a run, or a "
            "checkpoint in it"
        )
    match = _CHECKPOINT.fullmatch(folder.resolve().name)
    log = folder / FILE_NAME
    if not (log.is_file() or (folder / TRAINER_STATE_FILE).is_file() or _state_files(folder)):
        raise ValueError(_no_run(folder))
    if match and not log.is_file():
        log = folder.resolve().parent / FILE_NAME
    notes: list[str] = []
    state = _read_state(folder, notes)
    last = int(match[1]) if match else None
    probes, everything = _read_log(log, last, notes)
    events = tuple(event for event in everything if event.name != "end")
    legs = [to_number(event.values.get("seconds")) for event in everything if event.name == "end"]
    history = _history(state, notes)
    steps = [to_step(state.get("global_step")) or 0, *(p.step for p in probes)]
    monitor = _dig(state, "stateful_callbacks", "StabilityCallback", "args")
    return RunRecords(
        name=name or name_runs([folder])[0],
        path=str(path),
        history=history,
        probes=probes,
        events=events,
        num_steps=max([*steps, *(record["step"] for record in history)]),
        max_steps=to_step(state.get("max_steps")),
        seconds=math.fsum(filter(math.isfinite, legs)) if legs else None,
        monitor=monitor,
        log=log,
        notes=tuple(notes),
    )


def name_runs(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return a short name for each path: as many last parts as it takes to tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    count = 2 if any(_CHECKPOINT.fullmatch(each[-1]) for each in parts) else 1
    longest = max(map(len, parts), default=1)
    names = ["/".join(each[-count:]) for each in parts]
    while len(set(names)) < len(set(parts)) and count < longest:
        count += 1
        names = ["/".join(each[-count:]) for each in parts]
    # The same folder twice is two rows with numbers.
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]


def _state_files(folder: Path) -> list[Path]:
    """Return the Trainer states in a folder's checkpoints, newest first."""
    found = [
        (int(match[1]), child / TRAINER_STATE_FILE)
        for child in folder.iterdir()
        if (match := _CHECKPOINT.fullmatch(child.name)) and (child / TRAINER_STATE_FILE).is_file()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _read_state(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Return the Trainer state that has come furthest: the folder's own, or of a checkpoint.

    Damaged ones are noted, and an older checkpoint's is taken.
    """
    own = [folder / TRAINER_STATE_FILE] if (folder / TRAINER_STATE_FILE).is_file() else []
    paths = _state_files(folder)
    if not own and not paths:
        notes.append(f"There is no {TRAINER_STATE_FILE}: no evaluations, no time, few losses.")
    states = [_first_readable(own, notes), _first_readable(paths, notes)]
    return max(states, key=lambda state: to_step(state.get("global_step")) or 0)


def _first_readable(paths: Sequence[Path], notes: list[str]) -> dict[str, Any]:
    for path in paths:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(state, dict):
                return state
            problem = "no JSON object"
        except (OSError, ValueError, RecursionError) as error:
            problem = type(error).__name__
        notes.append(f"{'/'.join(path.parts[-2:])} is damaged ({problem}) and was left out.")
    return {}


def _history(state: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Any], ...]:
    records = state.get("log_history", [])
    if not isinstance(records, list):
        notes.append(f"log_history in {TRAINER_STATE_FILE} is no list: losses are missing.")
        return ()
    whole = [r for r in records if isinstance(r, dict) and to_step(r.get("step")) is not None]
    if len(whole) < len(records):
        notes.append(f"{len(records) - len(whole)} records in {TRAINER_STATE_FILE} have no step.")
    return tuple(record | {"step": to_step(record["step"])} for record in whole)


def _read_log(
    path: Path, last: int | None, notes: list[str]
) -> tuple[tuple[Probe, ...], tuple[Event, ...]]:
    """Read a log line by line, up to a step: with its maps it may be larger than memory."""
    probes: list[Probe] = []
    events: list[Event] = []
    damaged = 0
    if not path.is_file():
        notes.append(
            f"There is no {FILE_NAME}: attention was not watched (train with "
            "callbacks=[hf_stable.StabilityCallback()])."
        )
        return (), ()
    offset, start = 0, 0
    with path.open("rb") as file:
        for line in file:
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            content = _parse(cut_maps(line))
            attempt, step = to_step(content.get("attempt")), to_step(content.get("step"))
            if attempt is None or step is None:
                damaged += 1
            elif last is not None and step > last:
                continue
            elif content.get("event") == "probe":
                probes.append(_probe(attempt, step, start, content))
            elif content.get("event") in EVENTS:
                events.append(Event(content["event"], attempt, step, content))
            else:
                damaged += 1
    if damaged:
        lines = "1 line" if damaged == 1 else f"{damaged} lines"
        notes.append(f"{lines} of {FILE_NAME} could not be read and were left out.")
    if not probes:
        notes.append(f"{FILE_NAME} holds no probe{_by(last)}.")
    return tuple(probes), tuple(events)


def _by(last: int | None) -> str:
    return "" if last is None else f" up to step {last}"


def _parse(line: bytes) -> dict[str, Any]:
    """Return a line's object; an empty one where it is damaged."""
    try:
        content = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _probe(attempt: int, step: int, offset: int, content: Mapping[str, Any]) -> Probe:
    written = _dig(content, "quantities")
    numbers = {
        key: to_number(value)
        for key, value in content.items()
        if key not in ("step", "attempt", "loss") and isinstance(value, int | float)
    }
    return Probe(
        attempt=attempt,
        step=step,
        loss=to_number(content["loss"]) if "loss" in content else None,
        maps_at=offset if written.get("maps") else None,
        quantities={
            name: values
            for name, values in written.items()
            if name != "maps" and isinstance(values, dict)
        },
        rates=_dig(content, "effective_lr"),
        numbers=numbers,
    )


def _dig(content: Any, *keys: str) -> dict[str, Any]:
    """Follow keys into nested objects; an empty one where the way ends."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _no_run(folder: Path) -> str:
    inside = sorted(
        child.name
        for child in folder.iterdir()
        if child.is_dir() and ((child / FILE_NAME).is_file() or _state_files(child))
    )
    hint = f"; its subfolders do: {', '.join(inside)}" if inside else ""
    return f"{folder} holds neither {TRAINER_STATE_FILE} nor {FILE_NAME}{hint}"

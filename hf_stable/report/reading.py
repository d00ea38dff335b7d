"""Read what a training run left on disk: `trainer_state.json` and `stability.jsonl`.

Whatever is damaged, half-written or missing becomes a note; what can be read is kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_stable._file_names import TRAINER_STATE_FILE
from hf_stable.monitor.folder_lock import is_held
from hf_stable.monitor.log_file import FILE_NAME, older_log
from hf_stable.report.events import Event
from hf_stable.report.log_lines import GrowingLog, LoggedRun, read_log_lines
from hf_stable.report.results import loss_of_guessing, results_beside
from hf_stable.report.run_records import RunRecords
from hf_stable.report.states import (
    checkpoint_step,
    checkpoints_in,
    damage_note,
    dig,
    history_of,
    read_state,
)
from hf_stable.report.values import to_step, to_text

__all__ = ["name_runs", "read_run", "read_runs"]


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


def read_run(
    path: str | os.PathLike[str], name: str | None = None, growing: GrowingLog | None = None
) -> RunRecords:
    """Read what a run left behind.

    Args:
        path: the Trainer's output folder, or a checkpoint in it: then the run up to there.
        name: label; by default the folder's name.
        growing: the log of the folder, if it is read again and again.

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
    last = checkpoint_step(folder.resolve().name)
    log = folder / FILE_NAME
    if not (log.is_file() or _has_state(folder)):
        raise ValueError(_no_run(folder))
    if last is not None and not log.is_file():
        log = folder.resolve().parent / FILE_NAME
    notes: list[str] = []
    logged = _read_log(log, last, growing, notes)
    is_earlier = _is_earlier(log, logged) if last is None else lambda path, state: False
    state = read_state(folder, logged.events, notes, is_earlier)
    history = history_of(state, notes)
    legs = [event.seconds for event in logged.events if event.name == "end"]
    num_steps = _steps_done(state, history, logged)
    return RunRecords(
        name=name or name_runs([folder])[0],
        path=to_text(str(path)),
        history=(*history, *_later_results(folder, last, num_steps, notes)),
        probes=tuple(logged.probes),
        events=tuple(event for event in logged.events if event.name != "end"),
        batches=tuple(logged.batches),
        num_steps=num_steps,
        max_steps=to_step(state.get("max_steps")),
        has_ended=_has_ended(history, logged.events, num_steps) and not is_held(folder),
        seconds=math.fsum(filter(math.isfinite, legs)) if legs else None,
        guessing=loss_of_guessing(folder),
        monitor=dig(state, "stateful_callbacks", "StabilityCallback", "args"),
        log=log,
        notes=tuple(notes),
    )


def _steps_done(
    state: Mapping[str, Any], history: Sequence[Mapping[str, Any]], logged: LoggedRun
) -> int:
    known = [to_step(state.get("global_step")) or 0, *(probe.step for probe in logged.probes)]
    return max([*known, *(record["step"] for record in history)])


def _read_log(
    log: Path, last: int | None, growing: GrowingLog | None, notes: list[str]
) -> LoggedRun:
    if not log.is_file():
        notes.append(
            f"There is no {FILE_NAME}: attention was not watched (train with "
            "callbacks=[hf_stable.StabilityCallback()])."
        )
        return LoggedRun()
    try:
        logged = read_log_lines(log, last) if growing is None else growing.read()
    except OSError as error:
        notes.append(damage_note(log, error))
        return LoggedRun()
    notes += logged.notes(last)
    return logged


def _later_results(
    folder: Path, last: int | None, num_steps: int, notes: list[str]
) -> list[dict[str, Any]]:
    """Return the record of evaluations that came after the state was saved, if there were any."""
    found = results_beside(folder, notes) if last is None else {}
    return [{"step": num_steps, **found}] if found else []


def _has_ended(
    history: Sequence[Mapping[str, Any]], events: Sequence[Event], num_steps: int
) -> bool:
    """Return whether training came to its end and was not interrupted: the Trainer says so."""
    said = [record["step"] for record in history if "train_runtime" in record]
    # A leg ends before a rollback too; after one that could not be taken comes a stop.
    stopped = {event.attempt for event in events if event.name == "stop"}
    went_on = {event.attempt for event in events if event.name == "rollback"} - stopped
    ends = [event.step for event in events if event.name == "end" and event.attempt not in went_on]
    return max([*said, *ends], default=-1) >= num_steps


def _is_earlier(log: Path, logged: LoggedRun) -> Callable[[Path, Mapping[str, Any]], bool]:
    """Return what says whether a state is of an earlier run in the folder of a log.

    A run that begins anew puts the older log aside, or there was none. A log is written before the
    state of the same step. So a state that is older than the log, and further, is not of its run.
    """
    steps = [*(probe.step for probe in logged.probes), *(event.step for event in logged.events)]
    last = max(steps, default=0)
    try:
        written = log.stat().st_mtime
    except OSError:
        return lambda path, state: False
    began_anew = log.with_name(older_log(1)).exists()

    def is_earlier(path: Path, state: Mapping[str, Any]) -> bool:
        is_other = began_anew or not dig(state, "stateful_callbacks", "StabilityCallback")
        is_further = (to_step(state.get("global_step")) or 0) > last
        return is_other and is_further and path.stat().st_mtime < written

    return is_earlier


def name_runs(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return a short name for each path: as many last parts as it takes to tell them apart."""
    parts = [tuple(map(to_text, Path(path).resolve().parts)) for path in paths]
    count = 2 if any(checkpoint_step(each[-1]) is not None for each in parts) else 1
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


def _has_state(folder: Path) -> bool:
    own = folder / TRAINER_STATE_FILE
    return own.is_file() or any(
        (child / TRAINER_STATE_FILE).is_file() for child in checkpoints_in(folder)
    )


def _no_run(folder: Path) -> str:
    inside = sorted(
        to_text(child.name)
        for child in folder.iterdir()
        if child.is_dir() and ((child / FILE_NAME).is_file() or _has_state(child))
    )
    hint = f"; its subfolders do: {', '.join(inside)}" if inside else ""
    return f"{to_text(str(folder))} holds neither {TRAINER_STATE_FILE} nor {FILE_NAME}{hint}"

"""The file `stability.jsonl`: everything that a monitor saw and did, one JSON object a line."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_stable._json import from_json, to_json

__all__ = ["FILE_NAME", "StabilityLog", "older_log", "read_log"]

FILE_NAME = "stability.jsonl"

NOT_FINITE = ("nan", "inf", "-inf")
"""What 0.1.0 wrote for such numbers of an alarm; now they are null, as everywhere."""


def older_log(number: int) -> str:
    """Return the name of an earlier run's log, of which the first has the number 1."""
    return f"stability-{number}.jsonl"


class StabilityLog:
    """Appends lines, each flushed when written; a resume drops the lines after its checkpoint.

    Every line has `event`, `attempt` (how many rollbacks came before) and `step`. Within an
    attempt no step has two lines of the same event. Numbers that are not finite are null.

    A file that cannot be written, or a disk that is full, is warned of once. Training goes on, and
    each later line is tried again.

    Args:
        folder: created if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Touch nothing yet."""
        self.path = Path(folder) / FILE_NAME
        self._has_failed = False

    def start(self) -> None:
        """Begin a new run: what an earlier run left is kept under the next free number."""
        with self._bearing_failure():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(b"")
            if not self.path.stat().st_size:
                return
            number = 1
            while (old := self.path.with_name(older_log(number))).exists():
                number += 1
            self.path.rename(old)

    def resume(self, attempt: int, step: int) -> None:
        """Drop what a run wrote after the checkpoint that it is resumed from, and damaged lines."""
        with self._bearing_failure():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(b"")
            handle, temporary = tempfile.mkstemp(".tmp", "stability-", self.path.parent)
            try:
                with open(handle, "wb") as kept, self.path.open("rb") as lines:
                    kept.writelines(
                        raw if raw.endswith(b"\n") else raw + b"\n"
                        for raw in lines
                        if (line := _parse(raw)) is not None and _is_before(line, attempt, step)
                    )
                shutil.copymode(self.path, temporary)
                os.replace(temporary, self.path)
            finally:
                with suppress(FileNotFoundError):
                    os.remove(temporary)

    def write(self, event: str, attempt: int, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        line = to_json({"event": event, "attempt": attempt, "step": step, **values})
        with self._bearing_failure():
            self._append(line.encode() + b"\n")

    def _append(self, line: bytes) -> None:
        """Append one line whole, or nothing of it."""
        if self.path.exists() and not self.path.is_file():
            raise OSError("it is no regular file")
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(size)
                raise

    @contextmanager
    def _bearing_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._has_failed:
                return
            self._has_failed = True
            warnings.warn(
                f"cannot write {self.path} ({error.strerror or error}): what the monitor sees is "
                "missing there, training goes on; the Trainer's records and trackers have it, and "
                "the report needs an output_dir that can be written",
                UserWarning,
                stacklevel=4,
            )


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a folder's `stability.jsonl`, each with `event`, `attempt` and `step`.

    Lines that are damaged are left out with a warning; the last one, which a crash has cut short,
    without. Numbers that are not finite are None, in older files too, which spelled them otherwise.

    Raises:
        OSError: if there is no such file, or it cannot be read.
    """
    path = Path(folder) / FILE_NAME
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    found: list[dict[str, Any]] = []
    damaged: list[int] = []
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            line = _parse(raw)
            if line is not None:
                found.append(line)
            elif raw.strip() and raw.endswith(b"\n"):
                damaged.append(number)
    if damaged:
        warnings.warn(
            f"{path}: {len(damaged)} damaged lines were left out, the first is line {damaged[0]}",
            UserWarning,
            stacklevel=2,
        )
    return found


def _is_before(line: Mapping[str, Any], attempt: int, step: int) -> bool:
    if line["attempt"] != attempt:
        return line["attempt"] < attempt
    return line["step"] <= step


def _parse(raw: bytes) -> dict[str, Any] | None:
    """Return what a line says; None where it is damaged, whatever bytes it holds."""
    try:
        content = from_json(raw.decode())
    except ValueError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("event"), str):
        return None
    if not all(type(content.get(name)) is int for name in ("attempt", "step")):
        return None
    for name in ("value", "threshold"):
        if content.get(name) in NOT_FINITE:
            content[name] = None
    return content

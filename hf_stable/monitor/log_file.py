"""The file `stability.jsonl`: everything that a monitor saw and did, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["FILE_NAME", "StabilityLog", "read_log"]

FILE_NAME = "stability.jsonl"


class StabilityLog:
    """Appends lines, each flushed when written; a resume drops the lines after its checkpoint.

    Every line has `event`, `attempt` (how many rollbacks came before) and `step`. Within an
    attempt no step has two lines of the same event.

    Args:
        folder: created if it is not there.

    Raises:
        OSError: if the file cannot be written, naming it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open nothing yet, but make sure that it can be."""
        self.path = Path(folder) / FILE_NAME
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a"):
                pass
        except OSError as error:
            raise OSError(
                f"cannot write {self.path} ({error.strerror}): StabilityCallback keeps its values "
                "there; give TrainingArguments an output_dir that can be written"
            ) from error

    def start(self) -> None:
        """Begin a new run: what an earlier run left is kept under the next free number."""
        if not self.path.stat().st_size:
            return
        number = 1
        while (old := self.path.with_name(f"stability-{number}.jsonl")).exists():
            number += 1
        self.path.rename(old)

    def resume(self, attempt: int, step: int) -> None:
        """Drop what a run wrote after the checkpoint that it is resumed from."""
        kept = [
            line
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            if _is_before(line, attempt, step)
        ]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)

    def write(self, event: str, attempt: int, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        line = json.dumps({"event": event, "attempt": attempt, "step": step, **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a folder's `stability.jsonl`, a line cut short by a crash left out."""
    lines = (Path(folder) / FILE_NAME).read_text(encoding="utf-8").splitlines()
    return [content for line in lines if (content := _parse(line)) is not None]


def _is_before(line: str, attempt: int, step: int) -> bool:
    content = _parse(line)
    if content is None or content["attempt"] != attempt:
        return content is not None and content["attempt"] < attempt
    return content["step"] <= step


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None

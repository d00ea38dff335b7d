"""What a watched run tells, by its first process: lines in its file and on the console."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hf_stable._ranks import value_of_first_rank
from hf_stable.monitor.console import say
from hf_stable.monitor.folder_lock import FolderLock
from hf_stable.monitor.log_file import FILE_NAME, StabilityLog

__all__ = ["Journal"]


class Journal:
    """The file `stability.jsonl` and the console of one run; silent before it is opened."""

    def __init__(self) -> None:
        """Begin with no run."""
        self._log: StabilityLog | None = None
        self._lock: FolderLock | None = None

    def open(self, folder: str, *, writes: bool) -> None:
        """Take up a run; every process has to call it.

        Args:
            folder: into which the run writes.
            writes: whether this is the process that does.

        Raises:
            RuntimeError: on every process, if another training writes there.
        """
        self.close()
        self._log = StabilityLog(folder) if writes else None
        holder = None
        if writes:
            with suppress(OSError):  # the file says so, when it is written
                os.makedirs(folder, exist_ok=True)
            self._lock = FolderLock(folder)
            holder = self._lock.acquire()
        holder = value_of_first_rank(holder)
        if holder is not None:
            raise RuntimeError(
                f"another training writes into {folder} ({holder}): each would overwrite the "
                f"other's checkpoints and {FILE_NAME}. Give this one an output_dir of its own, or "
                "end the other"
            )

    def begin(self, attempt: int, step: int) -> None:
        """Make the file that of a run at a step: drop what is later, or keep an older run's aside.

        Args:
            attempt: how many rollbacks came before.
            step: that training resumes from, 0 if it does not.
        """
        if self._log is not None and step:
            self._log.resume(attempt, step)
        elif self._log is not None:
            self._log.start()

    def write(self, event: str, attempt: int, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to the file."""
        if self._log is not None:
            self._log.write(event, attempt, step, values)

    def say(self, message: str, *, is_alarm: bool = False) -> None:
        """Print a line."""
        if self._log is not None:
            say(message, is_alarm=is_alarm)

    def close(self) -> None:
        """Let other trainings write into the folder."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

"""A page that is written anew as its runs go on, until all of them have ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hf_stable._file_names import TRAINER_STATE_FILE
from hf_stable.monitor.log_file import FILE_NAME
from hf_stable.report.log_lines import GrowingLog
from hf_stable.report.page import require_page_packages
from hf_stable.report.reading import name_runs, read_run
from hf_stable.report.results import RESULT_FILES
from hf_stable.report.run_records import RunRecords
from hf_stable.report.states import checkpoints_in
from hf_stable.report.writing import FORMATS, WrittenReport, beside, write_runs

__all__ = ["FollowedRuns", "follow_report"]

EVERY = 10.0
"""Seconds from look to look."""

LONGEST = 86_400.0
"""A day: beyond some size of a wait, the clock of a machine has no number for its end."""


class FollowedRuns:
    """Runs that are read again and again, of each file only what is new.

    Args:
        paths: output folders of the Trainer.

    Raises:
        FileNotFoundError: if one does not exist.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Read nothing yet."""
        self.paths = [Path(path) for path in paths]
        for path in self.paths:
            if not path.is_dir():
                raise FileNotFoundError(f"{path} does not exist or is no folder; give output_dir")
        self._names = name_runs(paths)
        self._logs = [GrowingLog(path / FILE_NAME) for path in self.paths]
        self._seen: list[tuple[str, int, int]] | None = None
        self.lacking = ""
        """Which run has left nothing yet, in words; empty once all have left something."""

    def changes(
        self,
        every: float,
        sleep: Callable[[float], None],
        on_waiting: Callable[[str], None] = lambda lacking: None,
    ) -> Iterator[list[RunRecords]]:
        """Yield all runs whenever they have gone on, until all of them have ended.

        Args:
            every: seconds from look to look.
            sleep: waits so many seconds.
            on_waiting: called with `lacking` where it is another one than at the last look.
        """
        told = ""
        while True:
            runs = self.read_if_changed()
            if self.lacking not in ("", told):
                told = self.lacking
                on_waiting(told)
            if runs is not None:
                yield runs
                if all(run.has_ended for run in runs):
                    return
            sleep(every)

    def read_if_changed(self) -> list[RunRecords] | None:
        """Return all runs if a file of theirs has changed since the last look, or None.

        Also None as long as one of them has left nothing yet.
        """
        marks = [mark for path in self.paths for mark in _marks(path)]
        if marks == self._seen:
            return None
        self._seen = marks
        try:
            runs = [
                read_run(path, name, log)
                for path, name, log in zip(self.paths, self._names, self._logs, strict=True)
            ]
        except ValueError as error:  # there is no state and no log yet
            self.lacking = str(error)
            return None
        self.lacking = ""
        return runs


def follow_report(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    every: float = EVERY,
    on_written: Callable[[WrittenReport], None] = lambda written: None,
    on_waiting: Callable[[str], None] = lambda lacking: None,
    sleep: Callable[[float], None] = time.sleep,
) -> WrittenReport:
    """Write the page of `write_report` whenever its runs have gone on, until all have ended.

    The page loads itself anew and keeps what a reader has chosen on it. The last one does not.

    Args:
        paths: output folders of the Trainer, which may be empty yet.
        output: file to write; by default beside the run.
        every: seconds from look to look.
        on_written: called after each page.
        on_waiting: called with what is missing while a run has left nothing to report on.
        sleep: waits so many seconds.

    Returns:
        The last report.

    Raises:
        ValueError: if `every` is not above zero, or no run is given.
        FileNotFoundError: if a folder does not exist.
        ModuleNotFoundError: if plotly or jinja2 is not installed.
        OSError: if the page cannot be written.
        KeyboardInterrupt: after a last page was written.
    """
    if not 0 < every <= LONGEST:
        raise ValueError(
            f"every is a number of seconds above zero, {LONGEST:g} at most, got {every}"
        )
    if not paths:
        raise ValueError("give at least one run: the output_dir of a Trainer")
    require_page_packages()
    followed = FollowedRuns(paths)
    target = beside(paths, FORMATS["html"]) if output is None else Path(output)
    runs: list[RunRecords] = []
    try:
        for runs in followed.changes(every, sleep, on_waiting):
            ended = all(run.has_ended for run in runs)
            written = write_runs(runs, target, "html", refresh=None if ended else every)
            on_written(written)
    except KeyboardInterrupt:
        if runs:
            write_runs(runs, target, "html")
        raise
    return written


def _marks(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of each file of a run that a report reads."""
    states = [folder / name for name in (TRAINER_STATE_FILE, FILE_NAME, *RESULT_FILES)]
    states += [child / TRAINER_STATE_FILE for child in checkpoints_in(folder)]
    marks = []
    for path in states:
        try:
            status = path.stat()
        except OSError:
            continue
        marks.append((str(path), status.st_size, status.st_mtime_ns))
    return marks

"""Going back for good: a run that dies after a rollback must not resume what it went back from.

The checkpoints of the abandoned attempt are moved to where no resume looks for them, and the
checkpoint that is gone back to says how often the run has gone back and at which rates it goes on.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from hf_stable._file_names import TRAINER_STATE_FILE
from hf_stable._json import to_json
from hf_stable._whole_files import write_whole
from hf_stable.monitor.rollbacks import Due

__all__ = ["FOLDER", "abandon_checkpoints", "write_due"]

FOLDER = "_abandoned-{}"
"""In the output folder, one for each rollback. The Trainer pushes nothing that begins with "_"."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def write_due(checkpoint: str, callback: str, due: Due) -> None:
    """Write into a checkpoint what a run that resumes from it has to become.

    Args:
        checkpoint: its folder, written by a run with the callback.
        callback: name of the callback's class, under which the Trainer keeps its state.
        due: the rollbacks and rates.

    Raises:
        OSError: if its trainer_state.json cannot be read or written.
        ValueError: if that has no state of the callback.
    """
    path = Path(checkpoint) / TRAINER_STATE_FILE
    state = json.loads(path.read_text(encoding="utf-8"))
    try:
        progress = state["stateful_callbacks"][callback]["attributes"]["progress"]
        progress["rollbacks"]["due"] = list(due)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has no state of {callback}") from error
    with write_whole(path) as file:
        file.write(to_json(state, indent=2) + "\n")


def abandon_checkpoints(folder: str, after: int, until: int) -> Path | None:
    """Move the checkpoints of some steps to a folder of their own, which no resume looks into.

    Args:
        folder: with the checkpoints.
        after: the last step that is kept.
        until: the last step that was abandoned: what is beyond it is another run's.

    Returns:
        Where they are now; None if there were none.

    Raises:
        OSError: if one cannot be moved.
    """
    steps = {
        int(found[1]): child
        for child in Path(folder).iterdir()
        if child.is_dir() and (found := _CHECKPOINT.fullmatch(child.name))
    }
    # The newest first: it is the one that a resume would take.
    abandoned = [steps[step] for step in sorted(steps, reverse=True) if after < step <= until]
    if not abandoned:
        return None
    number = 1
    while (target := Path(folder, FOLDER.format(number))).exists():
        number += 1
    target.mkdir()
    for child in abandoned:
        os.rename(child, target / child.name)
    return target

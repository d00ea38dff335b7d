"""Whether a run goes on from a checkpoint in its folder, and what happens if it is done already."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from recipes.settings import Settings

__all__ = ["Done", "EndsWhatIsDone", "goes_on_from"]


FREE_TO_CHANGE = ("output", "threads", "save_total_limit")
"""Settings that do not make another run of one that goes on."""


def goes_on_from(settings: Settings, output: Path) -> bool:
    """Return whether a folder has a checkpoint; where it has none, note whose folder it is now.

    Raises:
        ValueError: if the checkpoint is that of another run.
    """
    last = get_last_checkpoint(output) if output.is_dir() else None
    note = output / "settings.json"
    new = dataclasses.asdict(settings)
    if last is None:
        if int(os.environ.get("RANK", 0)) == 0:
            output.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(new, indent=1) + "\n")
        return False
    if not note.is_file():
        raise ValueError(
            f"{last} is a checkpoint without {note.name} beside it, so it may be of any run; give "
            "another --output, or remove the folder"
        )
    # Settings that came later have their defaults in files from before.
    old = dataclasses.asdict(Settings(**json.loads(note.read_text())))
    changed = [key for key in new if new[key] != old[key] and key not in FREE_TO_CHANGE]
    if changed:
        values = ", ".join(f"{key} {old[key]!r} and not {new[key]!r}" for key in changed)
        raise ValueError(
            f"{output} has a checkpoint of a run with {values}; give another --output, or remove "
            "the folder"
        )
    return True


class Done(Exception):
    """There is nothing left to train."""


class EndsWhatIsDone(TrainerCallback):
    """Ends a training whose checkpoint is that of its last step, with the checkpoint loaded.

    The Trainer would take one step more.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step that the checkpoint was written at."""
        if state.global_step >= state.max_steps:
            raise Done

"""Which checkpoints of a run were saved to the end."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress

from safetensors import SafetensorError, safe_open

from hf_stable._file_names import TRAINER_STATE_FILE

__all__ = ["is_complete", "mark_incomplete", "newest_complete"]

Folder = str | os.PathLike[str]


def mark_incomplete(checkpoint: Folder) -> None:
    """Take away what `is_complete` knows a whole checkpoint by, before it is written again."""
    with suppress(FileNotFoundError):
        os.remove(os.path.join(checkpoint, TRAINER_STATE_FILE))


def is_complete(checkpoint: Folder) -> bool:
    """Say whether the Trainer finished writing a checkpoint.

    `trainer_state.json` is written last; every safetensors file has to be as long as it says.
    """
    try:
        with open(os.path.join(checkpoint, TRAINER_STATE_FILE), encoding="utf-8") as file:
            json.load(file)
        for name in os.listdir(checkpoint):
            if name.endswith(".safetensors"):
                with safe_open(os.path.join(checkpoint, name), framework="pt"):
                    pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def newest_complete(folder: Folder) -> str | None:
    """Return the path of the last checkpoint of a run that was saved to the end, if any was."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", name), name) for name in os.listdir(folder)]
    newest_first = sorted(((int(match[1]), name) for match, name in found if match), reverse=True)
    paths = (os.path.join(folder, name) for _, name in newest_first)
    return next((path for path in paths if is_complete(path)), None)

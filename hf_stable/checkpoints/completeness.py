"""Which checkpoints of a run have every file that the run writes, whole."""

from __future__ import annotations

import functools
import json
import os
import re
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hf_stable._file_names import SIDECAR_FILE, TRAINER_STATE_FILE
from hf_stable.checkpoints.weight_files import open_weights

__all__ = [
    "OPTIMIZER_FILE",
    "Expected",
    "damage_in",
    "is_complete",
    "mark_incomplete",
    "missing_from",
    "newest_complete",
]

Folder = str | os.PathLike[str]

OPTIMIZER_FILE, _SCHEDULER, _SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"
_PICKLES = re.compile(
    r"(optimizer|scheduler|scaler|rng_state(_\d+)?|pytorch_model.*)\.(pt|pth|bin)"
)
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Expected:
    """What a run writes into each of its checkpoints, beside weights and the Trainer's state.

    Attributes:
        optimizer: optimizer and scheduler, and the state of random numbers (not under
            `save_only_model`, nor where an engine writes them in a form of its own).
        scaler: the scale of float16 losses.
        sidecar: a patched model's raw weights.
    """

    optimizer: bool = False
    scaler: bool = False
    sidecar: bool = False


def mark_incomplete(checkpoint: Folder) -> None:
    """Take away what `is_complete` knows a whole checkpoint by, before it is written again."""
    with suppress(FileNotFoundError):
        os.remove(os.path.join(checkpoint, TRAINER_STATE_FILE))


def missing_from(checkpoint: Folder, expected: Expected) -> list[str]:
    """Return the names of the files that a checkpoint of a run should have and has not."""
    there = set(os.listdir(checkpoint))
    wanted = [TRAINER_STATE_FILE]  # written last
    if expected.optimizer:
        wanted += [OPTIMIZER_FILE, _SCHEDULER]
    wanted += [_SCALER] * expected.scaler + [SIDECAR_FILE] * expected.sidecar
    missing = [name for name in wanted if name not in there]
    if expected.optimizer and not _has_random_states(there):
        missing.append("rng_state.pth")
    return missing


def damage_in(checkpoint: Folder) -> str | None:
    """Say which file of a checkpoint is cut short or overwritten, or return None.

    Every file is opened as what it should be. A pickle of torch is a zip archive with checksums,
    which are compared; it is not unpickled. A safetensors file has to be as long as it says.
    """
    for name in sorted(os.listdir(checkpoint)):
        path = os.path.join(checkpoint, name)
        try:
            if name == TRAINER_STATE_FILE:
                _check_state(path)
            elif name == _INDEX:
                open_weights(path)  # names what is missing
            elif name.endswith(".safetensors"):
                with safe_open(path, framework="pt"):
                    pass
            elif _PICKLES.fullmatch(name) and os.path.isfile(path):
                status = os.stat(path)
                _check_archive(path, status.st_size, status.st_mtime_ns)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{name} is damaged ({error})"
    return None


def is_complete(checkpoint: Folder, expected: Expected | None = None) -> bool:
    """Say whether a checkpoint was written to the end, with all that its run writes."""
    return not missing_from(checkpoint, expected or Expected()) and damage_in(checkpoint) is None


def newest_complete(folder: Folder, expected: Expected | None = None) -> str | None:
    """Return the path of the last checkpoint of a run that is complete, if any is."""
    numbers = {
        int(match[1]): path
        for path in Path(folder).glob("*/")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    newest_first = (str(numbers[number]) for number in sorted(numbers, reverse=True))
    return next((path for path in newest_first if is_complete(path, expected)), None)


def _has_random_states(names: set[str]) -> bool:
    """Say whether there is a state for one process, or one for each of several."""
    ranks = filter(None, (re.fullmatch(r"rng_state_(\d+)\.pth", name) for name in names))
    numbers = sorted(int(match[1]) for match in ranks)
    return "rng_state.pth" in names or (bool(numbers) and numbers == list(range(len(numbers))))


def _check_state(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        if not isinstance(json.load(file), dict):
            raise ValueError("it is no mapping")


@functools.lru_cache(maxsize=256)
def _check_archive(path: str, size: int, modified: int) -> None:
    """Raise for an archive that is damaged; size and time are those of the file looked at."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name):
                pass
        # torch can be told to write no checksums: then there is nothing to compare.
        if torch.serialization.get_crc32_options() and (bad := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {bad} does not fit")

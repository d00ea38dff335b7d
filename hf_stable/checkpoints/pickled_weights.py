"""Weights in pickles of torch, as DeepSpeed leaves them: read as tensors, and as nothing else."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["find_pickled", "read_pickled"]

_FILE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"


def find_pickled(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the pickles with the weights of a folder that has no safetensors, if any.

    Raises:
        ValueError: if one that the index names is missing.
    """
    folder = Path(folder)
    if any(folder.glob("*.safetensors")):
        return []
    if (folder / _FILE).is_file():
        return [folder / _FILE]
    if not (folder / _INDEX).is_file():
        return []
    names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {missing[0]!r}, which its {_INDEX} names; write it anew")
    return [folder / name for name in names]


def read_pickled(files: list[Path]) -> dict[str, Tensor]:
    """Read tensors by their names, on the CPU; what else a pickle would do is not done.

    Raises:
        ValueError: if a file is damaged, or holds anything but tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{file} is no whole file of weights ({error}); write it anew"
            ) from error
        if not isinstance(found, dict) or not all(
            isinstance(value, Tensor) for value in found.values()
        ):
            raise ValueError(f"{file} holds something other than tensors by name")
        tensors |= found
    return tensors

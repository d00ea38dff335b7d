"""Weights in pickles of torch, as DeepSpeed leaves them: read as tensors, and as nothing else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

from hf_stable.checkpoints.weight_files import files_of

__all__ = ["find_pickled", "read_pickled"]

_FILE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"


def find_pickled(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the pickles with the weights of a folder that has no safetensors, if any.

    Raises:
        FileNotFoundError: if one that the index names is missing.
        ValueError: if the index is damaged, or names a file outside the folder.
    """
    folder = Path(folder)
    if any(folder.glob("*.safetensors")):
        return []
    found = (folder / name for name in (_FILE, _INDEX) if (folder / name).is_file())
    return next(map(files_of, found), [])


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
            raise ValueError(
                f"{file} holds something other than tensors by name, which is all that a model's "
                "weights are; give the folder that zero_to_fp32.py or save_pretrained wrote"
            )
        tensors |= found
    return tensors

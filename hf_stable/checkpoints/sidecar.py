"""The file beside a checkpoint's plain weights that holds what folding loses.

`hf_stable_state.safetensors` has the raw weight, gamma, sigma, u and v of each patched layer
under the names of the model in memory, and the configs as metadata. Knows files, not models.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_stable._file_names import SIDECAR_FILE
from hf_stable._json import from_json, to_json
from hf_stable._whole_files import is_unfinished, unfinished
from hf_stable.checkpoints.saved_state import WAY_OUT, Configs, SavedState, check_layers
from hf_stable.methods.config import MethodConfig
from hf_stable.methods.patching import METHODS

__all__ = [
    "FORMAT_VERSION",
    "checksum",
    "read_provenance",
    "read_state",
    "remove_state",
    "write_state",
]

FORMAT_VERSION = 1

_METADATA_KEY = "hf_stable"
_STEM = SIDECAR_FILE.removesuffix(".safetensors")
_OUR_FILES = re.compile(rf"{_STEM}(-\d{{5}}-of-\d{{5}})?\.safetensors")

Folder = str | os.PathLike[str]


def write_state(
    folder: Folder,
    parts: Configs,
    tensors: Mapping[str, Tensor],
    max_shard_size: int | str = "50GB",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the sidecar of a folder, whole or not at all.

    `hf_stable_state.safetensors` is renamed into place last and holds the metadata; where the
    tensors need more than one file, it names the shards and holds no tensor itself.

    Args:
        folder: where the plain weights are.
        parts: as in `SavedState`.
        tensors: as in `SavedState`.
        max_shard_size: as for `save_pretrained`.
        provenance: as in `SavedState`.

    Raises:
        OSError: if it cannot be written.
    """
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{_STEM}{{suffix}}.safetensors", max_shard_size=max_shard_size
    )
    as_data = {name: list(map(_as_data, configs)) for name, configs in parts.items()}
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "hf_stable_version": version("hf-stable"),
        "configs": next(iter(as_data.values()), []),
        "parts": as_data,
        "checksum": checksum(tensors),
        "provenance": dict(provenance or {}),
    }
    files = {
        file: {key: tensors[key] for key in keys}
        for file, keys in split.filename_to_tensors.items()
    } or {SIDECAR_FILE: {}}  # a method may have no tensors: then it is the configs that count
    if split.is_sharded:
        description["shards"] = sorted(files)
        files[SIDECAR_FILE] = {}  # comes last: the shards count from when it is there
    for file, content in files.items():
        _replace_file(os.path.join(folder, file), content, description)
    remove_state(folder, keep=files)


def remove_state(folder: Folder, keep: Container[str] = ()) -> None:
    """Remove the sidecar of an earlier save, which would continue a model that is gone."""
    for name in os.listdir(folder):
        final = name.removeprefix(".").rpartition(".safetensors")[0] + ".safetensors"
        ours = _OUR_FILES.fullmatch(name) and name not in keep
        if ours or (_OUR_FILES.fullmatch(final) and is_unfinished(name, final)):
            os.remove(os.path.join(folder, name))


def read_state(folder: Folder) -> SavedState:
    """Read the sidecar of a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or of a later format.
    """
    path = os.path.join(folder, SIDECAR_FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} is missing: without the raw weights and gamma in it, a patched model cannot "
            f"be continued. {WAY_OUT}"
        )
    with _naming_damage(path):
        description, tensors = _read_file(path)
    found, written_by = description.get("format_version"), description.get("hf_stable_version")
    if type(found) is int and found > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {found}, written by hf_stable {written_by}; this version reads up "
            f"to {FORMAT_VERSION}. Upgrade hf_stable"
        )
    with _naming_damage(path):
        for shard in _shards(description):
            tensors |= _read_file(os.path.join(folder, shard))[1]
        if checksum(tensors) != description["checksum"]:
            raise ValueError("the checksum does not fit the content")
        check_layers(tensors)
        provenance = description.get("provenance", {})
        if not (isinstance(provenance, dict) and isinstance(written_by, str)):
            raise ValueError("its provenance or version is of a wrong type")
        if type(found) is not int:
            raise ValueError(f"its format is {found!r}, no number")
        return SavedState(path, _parts(description), tensors, written_by, provenance)


def read_provenance(folder: Folder) -> dict[str, Any]:
    """Read what the sidecar of a folder says of the model's provenance, and no tensor.

    Returns:
        As in `SavedState`; empty where there is no sidecar.

    Raises:
        ValueError: if it is damaged.
    """
    path = os.path.join(folder, SIDECAR_FILE)
    if not os.path.isfile(path):
        return {}
    with _naming_damage(path), safe_open(path, framework="pt") as file:
        provenance = _describe(file).get("provenance", {})
        if not isinstance(provenance, dict):
            raise ValueError("its provenance is of a wrong type")
        return provenance


@contextmanager
def _naming_damage(path: str) -> Iterator[None]:
    """Turn whatever a damaged file leads to into an error that names it."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        problem = repr(error) if isinstance(error, LookupError) else error
        raise ValueError(f"{path} is damaged ({problem}). {WAY_OUT}") from error


def _as_data(config: MethodConfig) -> dict[str, Any]:
    return {"method": config.method, **config.to_dict()}


def _from_data(options: dict[str, Any]) -> MethodConfig:
    given = dict(options)
    return METHODS[given.pop("method")][0].from_dict(given)


def _parts(description: Mapping[str, Any]) -> Configs:
    # Without names of parts in it, the file is of before they were written down.
    parts = description.get("parts", {"": description["configs"]})
    return {name: tuple(map(_from_data, configs)) for name, configs in parts.items() if configs}


def _shards(description: Mapping[str, Any]) -> list[str]:
    shards = list(description.get("shards", ()))
    for name in shards:
        if not (isinstance(name, str) and _OUR_FILES.fullmatch(name)):
            raise ValueError(f"{name!r} is no name of a shard")
    return shards


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of tensors and their names."""
    value = 0
    for name in sorted(tensors):
        data = tensors[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        value = zlib.crc32(data, zlib.crc32(name.encode(), value))
    return value


def _replace_file(path: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    metadata = {"format": "pt", _METADATA_KEY: to_json(description)}
    try:
        with unfinished(path) as partial:
            save_file(tensors, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the plain weights are saved, but {path} could not be written ({error}): this "
            "checkpoint cannot be continued exactly"
        ) from error


def _read_file(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return _describe(file), {k: file.get_tensor(k) for k in file.keys()}


def _describe(file: Any) -> dict[str, Any]:
    description = from_json((file.metadata() or {})[_METADATA_KEY])
    if not isinstance(description, dict):
        raise ValueError("its description is no mapping")
    return description

"""The file beside a checkpoint's plain weights that holds what folding loses.

`hf_stable_state.safetensors` has the raw weight, gamma, sigma, u and v of each patched layer
under the names of the model in memory, and the configs as metadata. Knows files, not models.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_stable._file_names import SIDECAR_FILE
from hf_stable._json import to_json
from hf_stable.methods.config import MethodConfig
from hf_stable.methods.patching import METHODS
from hf_stable.methods.sigma_reparam.function import scale_blocks
from hf_stable.methods.sigma_reparam.layers import SigmaLayer

__all__ = [
    "FORMAT_VERSION",
    "WAY_OUT",
    "SavedState",
    "read_provenance",
    "read_state",
    "remove_state",
    "write_state",
]

FORMAT_VERSION = 1

WAY_OUT = (
    "Continue from another checkpoint, or start anew from the folded weights in the folder with "
    "from_pretrained and hf_stable.patch"
)

_METADATA_KEY = "hf_stable"
_LAYER_TENSORS = ("weight", *SigmaLayer.SIGMA_TENSORS)
_STEM = SIDECAR_FILE.removesuffix(".safetensors")
_OUR_FILES = re.compile(rf"{_STEM}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.tmp)?")

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class SavedState:
    """What a sidecar holds.

    Attributes:
        path: its file.
        configs: what the model was patched with.
        tensors: `<layer>.weight` (raw), `.gamma`, `.sigma`, `.sigma_u` and `.sigma_v` of each
            layer, named as in the model in memory.
        hf_stable_version: the version that wrote it.
        provenance: what the model started from and how it was trained, as plain data.
    """

    path: str
    configs: tuple[MethodConfig, ...]
    tensors: dict[str, Tensor]
    hf_stable_version: str
    provenance: dict[str, Any]

    @property
    def layers(self) -> list[str]:
        """Return the names of the patched layers."""
        return [key.removesuffix(".gamma") for key in self.tensors if key.endswith(".gamma")]

    def layer(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one layer by their own names."""
        return {part: self.tensors[f"{name}.{part}"] for part in _LAYER_TENSORS}

    def check_folds_to(self, weight: Tensor, name: str, block_dim: int) -> None:
        """Raise ValueError unless a layer folds to this plain weight, bit for bit.

        It is how a sidecar of another save than the weights beside it is told apart.
        """
        parts = self.layer(name)
        folded = scale_blocks(parts["weight"], parts["gamma"] / parts["sigma"], block_dim)
        given = weight.detach().cpu()
        if given.shape != folded.shape:
            raise ValueError(
                f"{self.path} holds {name!r} with shape {tuple(folded.shape)}, but the weights "
                f"loaded have {tuple(given.shape)}: num_labels, or another size in the config, is "
                f"not what it was at the save. {WAY_OUT}"
            )
        if not torch.allclose(given, folded.to(given.dtype), rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"{self.path} belongs to another save than the weights beside it: its {name!r} "
                f"does not fold to theirs. {WAY_OUT}"
            )


def write_state(
    folder: Folder,
    configs: Sequence[MethodConfig],
    tensors: Mapping[str, Tensor],
    max_shard_size: int | str = "50GB",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the sidecar of a folder, whole or not at all.

    `hf_stable_state.safetensors` is renamed into place last and holds the metadata; where the
    tensors need more than one file, it names the shards and holds no tensor itself.

    Args:
        folder: where the plain weights are.
        configs: what the model was patched with.
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
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "hf_stable_version": version("hf-stable"),
        "configs": [{"method": config.method, **config.to_dict()} for config in configs],
        "checksum": _checksum(tensors),
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
    for file in os.listdir(folder):
        if _OUR_FILES.fullmatch(file) and file not in keep:
            os.remove(os.path.join(folder, file))


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
    try:
        description, tensors = _read_file(path)
        for shard in description.get("shards", ()):
            tensors |= _read_file(os.path.join(folder, shard))[1]
        if _checksum(tensors) != description["checksum"]:
            raise ValueError("the checksum does not fit the content")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}). {WAY_OUT}") from error
    if description["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {description['format_version']}, written by hf_stable "
            f"{description['hf_stable_version']}; this version reads up to {FORMAT_VERSION}. "
            "Upgrade hf_stable"
        )
    configs = tuple(
        METHODS[options.pop("method")][0].from_dict(options) for options in description["configs"]
    )
    provenance = description.get("provenance", {})
    return SavedState(path, configs, tensors, description["hf_stable_version"], provenance)


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
    try:
        with safe_open(path, framework="pt") as file:
            return _describe(file).get("provenance", {})
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}). {WAY_OUT}") from error


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        data = tensors[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        checksum = zlib.crc32(data, zlib.crc32(name.encode(), checksum))
    return checksum


def _replace_file(path: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    partial = f"{path}.tmp"
    metadata = {"format": "pt", _METADATA_KEY: to_json(description)}
    try:
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the plain weights are saved, but {path} could not be written ({error}): this "
            "checkpoint cannot be continued exactly"
        ) from error
    finally:
        with suppress(FileNotFoundError):
            os.remove(partial)


def _read_file(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return _describe(file), {k: file.get_tensor(k) for k in file.keys()}


def _describe(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {})[_METADATA_KEY])

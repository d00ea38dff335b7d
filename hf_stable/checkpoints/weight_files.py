"""Safetensors checkpoints as they lie on disk: which file holds which tensor, read one at a time.

Nothing here builds a model or knows an architecture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_stable._file_names import SIDECAR_FILE
from hf_stable.measures.parts import Parts
from hf_stable.methods.sigma_reparam.function import scale_parts
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.stored_parts import (
    PARTS_TENSOR,
    parts_of_stored,
    plain_weight_name,
)

__all__ = [
    "WEIGHT_PATTERNS",
    "WeightFiles",
    "files_of",
    "open_sidecar",
    "open_weights",
    "remove_stale_weights",
]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

WEIGHT_PATTERNS = (_WEIGHTS, "model-?????-of-?????.safetensors", _INDEX)
"""Names of the files that transformers writes of a model's weights."""


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of one checkpoint by name, wherever they are.

    Attributes:
        path: the folder or file that was asked for.
        file_of: the file of each tensor, in the order of the files.
        shapes: the shape of each tensor.
    """

    path: Path
    file_of: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    _open: _OpenFile = field(default_factory=lambda: _OpenFile(), compare=False, repr=False)

    @property
    def files(self) -> list[Path]:
        """Return the files, each once."""
        return list(dict.fromkeys(self.file_of.values()))

    @property
    def raw_layers(self) -> list[str]:
        """Return the layers that are here with their raw weight, gamma, sigma, u and v."""
        return [name.removesuffix(".sigma_u") for name in self.shapes if name.endswith(".sigma_u")]

    def belongs_to_raw_layer(self, name: str) -> bool:
        """Say whether a tensor is what a patched layer has beside its weight."""
        layer, _, part = name.rpartition(".")
        beside = (*SigmaLayer.SIGMA_TENSORS, PARTS_TENSOR)
        return part in beside and f"{layer}.sigma_u" in self.shapes

    def parts(self, raw_layer: str) -> Parts:
        """Return where the parts of a raw layer's weight lie."""
        stored = f"{raw_layer}.{PARTS_TENSOR}"
        return parts_of_stored(
            self.shapes[f"{raw_layer}.weight"],
            self.shapes[f"{raw_layer}.sigma_u"],
            self.read(stored) if stored in self.shapes else None,
        )

    def plain_name(self, name: str) -> str:
        """Return what the plain model calls a tensor that is here, a raw weight among others."""
        layer = self._raw_layer_of(name)
        return name if layer is None else plain_weight_name(layer, self.parts(layer))

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ValueError: if its file is damaged.
        """
        path = self.file_of[name]
        with _naming(path):
            tensor = self._open.file(path).get_tensor(name)
        self._open.has_read += tensor.nbytes
        return tensor

    def read_effective(self, name: str) -> Tensor:
        """Read what a model computes with: of a patched layer's raw weight `gamma / sigma * W`.

        Raises:
            ValueError: if a file is damaged.
        """
        tensor, layer = self.read(name), self._raw_layer_of(name)
        if layer is None:
            return tensor
        scale = self.read(f"{layer}.gamma") / self.read(f"{layer}.sigma")
        return scale_parts(tensor, scale, self.parts(layer))

    def _raw_layer_of(self, name: str) -> str | None:
        """Return the patched layer whose raw weight a tensor is, or None for any other one."""
        layer = name.removesuffix(".weight")
        return layer if layer != name and f"{layer}.sigma_u" in self.shapes else None

    def read_first_row(self, name: str) -> Tensor:
        """Read the first entry along dimension 0 of one tensor, (1, ...), and no more."""
        path = self.file_of[name]
        with _naming(path):
            return self._open.file(path).get_slice(name)[0:1]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Read every tensor, one after the other."""
        for name in self.file_of:
            yield name, self.read(name)


def open_weights(path: str | os.PathLike[str]) -> WeightFiles:
    """Find the weights of a checkpoint and read the headers of their files.

    Args:
        path: a folder as `save_pretrained` or the Trainer writes it, sharded or not; any folder
            with safetensors files; one such file; or the index of a sharded checkpoint.

    Raises:
        FileNotFoundError: if there is nothing there, or a shard is missing.
        ValueError: if there are no safetensors, or a file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        for name in (_WEIGHTS, _INDEX):
            if (path / name).is_file():
                return _read_headers(path, files_of(path / name))
        sidecar = set(_sidecar_files(path))
        there = [file for file in sorted(path.glob("*.safetensors")) if file.is_file()]
        files = [file for file in there if file not in sidecar]
        if not files:
            raise ValueError(f"{path} holds no safetensors weights{_what_instead(path)}")
        return _read_headers(path, files)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a local folder or file")
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a regular file, and is not read")
    if path.suffix != ".safetensors" and not path.name.endswith(".safetensors.index.json"):
        raise ValueError(f"{path} is no safetensors file{_about_pickles([path])}")
    return _read_headers(path, files_of(path))


def open_sidecar(folder: Path) -> WeightFiles | None:
    """Read the headers of a folder's sidecar, or return None where there is none.

    Raises:
        ValueError: if one of its files is damaged.
    """
    files = _sidecar_files(folder)
    return _read_headers(folder / SIDECAR_FILE, files) if folder / SIDECAR_FILE in files else None


def remove_stale_weights(folder: str | os.PathLike[str]) -> None:
    """Remove what an earlier save with another number of files left beside a folder's weights.

    transformers removes the shards that a save does not replace, but neither their index nor the
    one file, which it would load instead of newer shards.
    """
    single, index = Path(folder) / _WEIGHTS, Path(folder) / _INDEX
    if not (single.is_file() and index.is_file()):
        return
    try:
        files_of(index)
    except (FileNotFoundError, ValueError):  # its shards have been removed: the one file is new
        index.unlink()
    else:
        single.unlink()


def _sidecar_files(folder: Path) -> list[Path]:
    """Return the files of a folder's sidecar: itself and its shards."""
    files = folder.glob(f"{SIDECAR_FILE.removesuffix('.safetensors')}*.safetensors")
    return sorted(file for file in files if file.is_file())


def files_of(path: Path) -> list[Path]:
    """Return the files behind a weights file (itself) or an index (its shards).

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if the index is damaged, or names a file outside its folder.
    """
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it is no index of shards ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or not _is_inside(path.parent / name, path.parent):
            raise ValueError(f"{path} is damaged: it names {name!r}, which is not in its folder")
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path.parent / name} is missing, which {path.name} names")
    return [path.parent / name for name in names]


def _is_inside(path: Path, folder: Path) -> bool:
    """Say whether a path stays below a folder, whatever links lead there."""
    return Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))


def _read_headers(path: Path, files: list[Path]) -> WeightFiles:
    file_of: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for each in files:
        with _opened(each) as file:
            for name in file.keys():
                if name in file_of:
                    raise ValueError(
                        f"{each} and {file_of[name]} both hold {name!r}, and only one can be meant"
                    )
                file_of[name] = each
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return WeightFiles(path, file_of, shapes)


MOST_MAPPED = 1 << 25
"""Bytes read from a file before it is opened anew: an open one keeps all of them in memory."""


class _OpenFile:
    """The file that was read last, which stays open: opening one reads all of its header."""

    def __init__(self) -> None:
        self.has_read = 0
        self._path: Path | None = None
        self._file: Any = None

    def file(self, path: Path) -> Any:
        if path != self._path or self.has_read > MOST_MAPPED:
            self._file, self._path, self.has_read = safe_open(path, framework="pt"), path, 0
        return self._file


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with _naming(path), safe_open(path, framework="pt") as file:
        yield file


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name a file that turns out to be damaged: safetensors' own error does not."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error})") from error


def _what_instead(folder: Path) -> str:
    """Say what the folder has that the user may have meant."""
    inside = sorted(p.parent.name for p in folder.glob("*/*.safetensors"))
    if inside:
        return f"; its subfolders do: {', '.join(dict.fromkeys(inside))}"
    return _about_pickles(list(folder.iterdir()))


def _about_pickles(files: list[Path]) -> str:
    pickles = sorted(file.name for file in files if file.suffix in _PICKLES)
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} may be a pickle, which can run code and is not read: load it with "
        "transformers where you trust it, and save_pretrained writes safetensors"
    )

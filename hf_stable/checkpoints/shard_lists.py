"""The list of shards of a distributed checkpoint, read without running what may stand in it.

torch writes the list as a pickle, which can name any function of any module to be called.
"""

from __future__ import annotations

import os
import pickle
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as metadata_types
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

__all__ = ["SafeReader"]

_NAMES = {
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
"""What a list of shards is made of beside the classes of torch's own module for it."""


class _PlainUnpickler(pickle.Unpickler):
    """Builds what a list of shards is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        found = getattr(metadata_types, name, None) if module == metadata_types.__name__ else None
        if isinstance(found, type) and found.__module__ == module:
            return found
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, of which no list of shards is made and which could run "
            "code; nothing was run"
        )


class SafeReader(FileSystemReader):
    """Reads a distributed checkpoint of anybody: a list of shards that is only that."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the list of shards.

        Raises:
            pickle.UnpicklingError: if anything but plain data stands in it.
            ValueError: if it is no list of shards, or names files outside the folder.
        """
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            metadata = _PlainUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}, no list of shards")
        for stored in (metadata.storage_data or {}).values():
            relative = PurePosixPath(stored.relative_path)
            if relative.is_absolute() or ".." in relative.parts:
                raise ValueError(f"it names the file {str(relative)!r} outside the folder")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

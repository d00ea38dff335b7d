"""A checkpoint that is named by its path or by its id on the Hub: where its files lie."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

__all__ = ["local_files"]

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")

NEEDED = ("*.safetensors", "*.safetensors.index.json", "config.json")


def local_files(source: str | os.PathLike[str]) -> Path:
    """Return a path that exists as it is; fetch an id of the form owner/name into the cache.

    Only safetensors and the config are fetched, with `hf auth login`'s token or HF_TOKEN.

    Raises:
        FileNotFoundError: if it is neither, or the Hub has no such repository or cannot be reached.
    """
    path = Path(source)
    if path.exists():
        return path
    name = os.fspath(source)
    if not _REPO_ID.fullmatch(name):
        raise FileNotFoundError(f"{name} does not exist; give a folder, a file or owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=list(NEEDED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name} does not exist here, and the Hub did not give it: {reason}"
        ) from error

"""Export and push what lies in a folder: load it as what it is, take tokenizer and card along."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_stable._file_names import SIDECAR_FILE
from hf_stable._wording import nearest
from hf_stable.checkpoints.described_models import named_class, read_config
from hf_stable.checkpoints.exporting import CARD_FILE, export, push_to_hub
from hf_stable.checkpoints.loading import load
from hf_stable.checkpoints.processing_files import PROCESSING_FILES, copy_files
from hf_stable.checkpoints.provenance import has_training
from hf_stable.checkpoints.weight_files import open_weights

__all__ = ["DTYPES", "export_saved", "list_published", "load_saved", "push_saved"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Folder = str | os.PathLike[str]


def load_saved(folder: Folder) -> PreTrainedModel:
    """Load a local folder, patched or plain, with the class that its config.json names.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if config.json names no class of transformers, or the weights are a patched
            model's raw ones.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: {os.fspath(folder)} is no folder of a model")
    config = read_config(folder)  # without what it asks for of attention: this only looks
    model_class = named_class(config, path)
    if os.path.isfile(os.path.join(folder, SIDECAR_FILE)):
        return load(model_class, folder)
    if any(Path(folder).glob("*.safetensors")):
        _refuse_raw(folder, open_weights(folder).shapes)
    model, info = model_class.from_pretrained(folder, config=config, output_loading_info=True)
    _refuse_raw(folder, info["unexpected_keys"])  # of a pickle, whose names only loading tells
    return model


def export_saved(
    source: Folder,
    output: Folder,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "50GB",
) -> tuple[str, ...]:
    """Write what `export` writes of the model in a folder, with its tokenizer or processor.

    Args:
        source: a folder with a model, patched or plain.
        output: where to; its card, or else that of `source`, is amended.
        dtype: one of `DTYPES`; by default that of the weights in `source`.
        max_shard_size: as for `save_pretrained`.

    Returns:
        The names of the files in `output`.

    Raises:
        FileNotFoundError: if there is no model in `source`.
        ValueError: if both folders are the same, for an unknown dtype, or as `load_saved` does.
    """
    wanted = _dtype(dtype)
    if os.path.realpath(source) == os.path.realpath(output):
        raise ValueError(
            f"{os.fspath(output)} is the folder of the model itself, which could not be continued "
            "after that; give another one"
        )
    export(
        load_saved(source),
        output,
        dtype=wanted,
        max_shard_size=max_shard_size,
        processing_class=_FilesBeside(source),
        checkpoint=source if has_training(source) else None,
    )
    return tuple(sorted(os.listdir(output)))


def list_published(
    source: Folder, *, dtype: str | None = None, max_shard_size: int | str = "50GB"
) -> dict[str, int]:
    """Return what `export_saved` would write and `push_saved` upload: sizes in bytes by name.

    It is written to a temporary folder and looked at there; nothing is sent anywhere.

    Raises:
        FileNotFoundError: if there is no model in `source`.
        ValueError: as `export_saved` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        export_saved(source, folder, dtype=dtype, max_shard_size=max_shard_size)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def push_saved(
    source: Folder,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "50GB",
) -> str:
    """Upload what `export_saved` writes to the Hub.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: if there is no model in `source`.
        ValueError: for an unknown dtype, or as `load_saved` does.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    wanted = _dtype(dtype)
    return push_to_hub(
        load_saved(source),
        repo_id,
        private=private,
        token=token,
        dtype=wanted,
        max_shard_size=max_shard_size,
        processing_class=_FilesBeside(source),
        checkpoint=source if has_training(source) else None,
    )


class _FilesBeside:
    """What lies beside a model and goes where it goes, saved as a tokenizer or processor would."""

    def __init__(self, folder: Folder) -> None:
        self.folder = Path(folder)

    def save_pretrained(self, target: Folder) -> None:
        has_card = (Path(target) / CARD_FILE).exists()
        copy_files(self.folder, target, PROCESSING_FILES | ({CARD_FILE} if not has_card else set()))


def _refuse_raw(folder: Folder, names: Iterable[str]) -> None:
    """Raise for raw weights, whose gamma and sigma from_pretrained leaves out."""
    if raw := sorted(name for name in names if name.endswith(".sigma_u")):
        layer = raw[0].removesuffix(".sigma_u")
        raise ValueError(
            f"{os.fspath(folder)} holds the raw weights of a patched model (first: {layer!r}) "
            f"without the {SIDECAR_FILE} that save_pretrained writes: they would be taken for "
            f"folded ones. Run hf-stable fold {os.fspath(folder)} OUT first, and go on with OUT "
            "(it reads safetensors)"
        )


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ValueError(
            f"dtype {name!r} is not allowed{nearest(name, DTYPES)}; choose one of "
            f"{', '.join(DTYPES)}"
        )
    return None if name is None else DTYPES[name]

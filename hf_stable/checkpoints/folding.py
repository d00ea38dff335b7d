"""Make a plain checkpoint folder out of one that a patched model left behind, file by file."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from hf_stable import modeling_hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable._json import to_json
from hf_stable._whole_files import write_whole
from hf_stable.checkpoints.described_models import empty_base_model, read_content
from hf_stable.checkpoints.fsdp_shards import (
    find_distributed,
    lost_norms,
    lost_norms_error,
    read_distributed,
    save_folded,
)
from hf_stable.checkpoints.pairing import pair_layers
from hf_stable.checkpoints.pickled_weights import find_pickled, read_pickled
from hf_stable.checkpoints.processing_files import DESCRIPTIONS, PROCESSING_FILES, copy_files
from hf_stable.checkpoints.saving import check_writable
from hf_stable.checkpoints.weight_files import WeightFiles, open_sidecar, open_weights
from hf_stable.modeling_hf_stable import MODEL_TYPE_PREFIX

__all__ = ["FoldReport", "fold_checkpoint"]


@dataclass(frozen=True)
class FoldReport:
    """What `fold_checkpoint` did.

    Attributes:
        source: the folder that was read.
        output: the folder that was written.
        num_layers: patched layers that are plain in it.
        lacks_norms: whether LayerNorms were removed from the model, which stay removed.
        files: names of its files.
    """

    source: str
    output: str
    num_layers: int
    lacks_norms: bool
    files: tuple[str, ...]


def fold_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: str | None = None,
) -> FoldReport:
    """Write the plain model of a folder to another one, without memory for the whole model.

    A folder that `save_pretrained` wrote holds folded weights already: they are checked against
    its sidecar and copied. Where the weights are the raw state dict of a patched model (saved by
    accelerate or by hand), each becomes `gamma / sigma * W`, one file in memory at a time. Config,
    tokenizer and the like are copied; the sidecar, pickles and the Trainer's own state are not.
    Removed LayerNorms stay removed: raw weights without them are refused, for the config beside
    them would bring them back.

    Where there is a `pytorch_model.bin` alone (DeepSpeed's `zero_to_fp32.py` and
    `save_16bit_model`), it is read as tensors and nothing else, and needs the memory that it takes.

    What FSDP saved in shards (SHARDED_STATE_DICT) is put together, patched or not, in the memory
    that one copy of the weights takes. It has no config of its own.

    Args:
        source: folder of a patched model, or one with FSDP's shards.
        output: folder to make; it must not exist, or be empty.
        config: for FSDP's shards, and only for them: folder, file or name on the Hub of the model's
            config.json.

    Raises:
        FileNotFoundError: if `source` or one of its shards is missing.
        ValueError: if there is nothing to fold, a file is damaged, the sidecar belongs to another
            save, raw weights lack LayerNorms, `output` is not empty, or `config` is missing,
            superfluous or of another model. Nothing is written then.
        OSError: if `output` cannot be written.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already; give a folder that is new or empty")
    if source.is_file():
        raise ValueError(f"{source} is a file; give the folder that it is in")
    shards = find_distributed(source)
    if (config is None) == (shards is not None):
        raise ValueError(
            f"{source} has FSDP's shards and no config.json; give the model's config (--config)"
            if shards is not None
            else f"{source} has no FSDP shards: it is folded with the config.json in it; leave out "
            "the config"
        )
    lacks_norms = _model_type(source).startswith(MODEL_TYPE_PREFIX)
    check_writable(output.parent)
    # Everything is written beside the output and renamed into place: all of it or nothing.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        partial = Path(folder) / output.name
        partial.mkdir()
        if shards is not None and config is not None:
            num_layers = save_folded(read_distributed(shards), config, partial)
        elif pickled := find_pickled(source):
            num_layers = save_folded(read_pickled(pickled), str(source), partial)
        else:
            num_layers = _fold_files(source, partial)
        if shards != source:
            _copy_others(source, partial)
        partial.replace(output)
    files = tuple(sorted(file.name for file in output.iterdir()))
    return FoldReport(str(source), str(output), num_layers, lacks_norms, files)


def _fold_files(source: Path, target: Path) -> int:
    """Fold safetensors file by file, or copy those that are folded; return how many layers."""
    weights, sidecar = open_weights(source), open_sidecar(source)
    if weights.raw_layers:
        _refuse_lost_norms(source, weights)
        _write_folded(weights, target)
        _check_written(weights, target)
        return len(weights.raw_layers)
    if sidecar is None:
        raise ValueError(
            f"{source} is plain: it has no {SIDECAR_FILE} and its weights no gamma. There is "
            "nothing to fold, from_pretrained loads it as it is"
        )
    num_layers = _check(weights, sidecar)
    _copy_weights(weights, target)
    _check_written(weights, target)
    return num_layers


def _refuse_lost_norms(source: Path, weights: WeightFiles) -> None:
    """Raise ValueError for weights that the config beside them would give fresh norms."""
    if _model_type(source) not in CONFIG_MAPPING:  # norms are removed from transformers' models
        return
    model = empty_base_model(source)
    prefix = f"{model.base_model_prefix}."
    if lost := lost_norms(model, [name.removeprefix(prefix) for name in weights.file_of]):
        raise lost_norms_error(model, lost)


def _model_type(folder: Path) -> str:
    """Return the model_type of the config in a folder, "" where there is none."""
    if not (folder / "config.json").is_file():
        return ""
    return str(read_content(folder).get("model_type", ""))


def _check(weights: WeightFiles, sidecar: WeightFiles) -> int:
    """Return the number of the sidecar's layers, all of which fold to one of the weights."""
    partners, unmatched = pair_layers(weights, sidecar)
    if unmatched:
        raise ValueError(
            f"{sidecar.path} belongs to another save than the weights beside it: {unmatched[0]!r} "
            "folds to none of them; save the model again"
        )
    return len({partner.layer for partner in partners.values()})


def _copy_others(source: Path, target: Path) -> None:
    names = PROCESSING_FILES | DESCRIPTIONS
    # What the weights of a distributed checkpoint come with is written already.
    copy_files(source, target, names - {path.name for path in target.iterdir()})
    if _model_type(target).startswith(MODEL_TYPE_PREFIX):
        # Ours, not what lies in the folder under its name.
        shutil.copyfile(
            modeling_hf_stable.__file__, target / Path(modeling_hf_stable.__file__).name
        )


def _copy_weights(weights: WeightFiles, target: Path) -> None:
    """Copy weights that are plain, file by file."""
    names = _names_for(weights.files)
    for file in weights.files:
        shutil.copyfile(file, target / names[file])
    _write_index({name: names[file] for name, file in weights.file_of.items()}, target)


def _write_folded(weights: WeightFiles, target: Path) -> None:
    """Fold raw weights file by file under their own names, and index them if there are several."""
    weight_map: dict[str, str] = {}
    names = _names_for(weights.files)
    for file in weights.files:
        plain = [
            name
            for name, where in weights.file_of.items()
            if where == file and not weights.belongs_to_raw_layer(name)
        ]
        tensors = {weights.plain_name(name): weights.read_effective(name) for name in plain}
        save_file(tensors, target / names[file], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, names[file])
    _write_index(weight_map, target)


def _names_for(files: list[Path]) -> dict[Path, str]:
    """Give weights files the names that transformers gives them: two folders may share names."""
    if len(files) == 1:
        return {files[0]: "model.safetensors"}
    total = len(files)
    return {
        file: f"model-{number:05d}-of-{total:05d}.safetensors"
        for number, file in enumerate(files, start=1)
    }


def _write_index(weight_map: dict[str, str], target: Path) -> None:
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        with write_whole(target / "model.safetensors.index.json") as file:
            file.write(to_json(index, indent=2) + "\n")


def _check_written(source: WeightFiles, target: Path) -> None:
    """Raise ValueError unless a folder has every tensor of the plain model in its shape."""
    expected = {
        source.plain_name(name): shape
        for name, shape in source.shapes.items()
        if not source.belongs_to_raw_layer(name)
    }
    written = open_weights(target).shapes
    if written != expected:
        differing = sorted(expected.items() ^ written.items())
        raise ValueError(
            f"{source.path} has {len(expected)} tensors, of which not all came out as they are "
            f"(first: {differing[0][0]!r}); nothing was kept. Save the model again and fold that"
        )

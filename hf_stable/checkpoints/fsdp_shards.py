"""Fold what FSDP left in shards: distributed checkpoints (DCP) have raw weights and no config.

With SHARDED_STATE_DICT the Trainer writes neither config.json nor safetensors, only a folder of
torch.distributed.checkpoint. It is read here in one process, whatever number of ranks wrote it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedModel

from hf_stable.architectures.paths import state_dict_name
from hf_stable.checkpoints.described_models import empty_model
from hf_stable.checkpoints.shard_lists import SafeReader
from hf_stable.methods.sigma_reparam.function import scale_parts
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.stored_parts import (
    PARTS_TENSOR,
    parts_of_stored,
    plain_weight_name,
)

__all__ = [
    "find_distributed",
    "lost_norms",
    "lost_norms_error",
    "read_distributed",
    "save_folded",
]

_METADATA = ".metadata"
_MODEL_FOLDER = "pytorch_model_fsdp_0"
_MODEL_PREFIX = "model."

Folder = str | os.PathLike[str]


def find_distributed(folder: Folder) -> Path | None:
    """Return the distributed checkpoint of a model that a folder is or holds, if any."""
    for path in (Path(folder), Path(folder) / _MODEL_FOLDER):
        # A file of that name alone, beside weights of another kind, is none.
        if (path / _METADATA).is_file() and any(path.glob("*.distcp")):
            return path
    return None


def read_distributed(path: Folder) -> dict[str, Tensor]:
    """Read the tensors of a distributed checkpoint whole, on the CPU.

    torch keeps the list of shards as a pickle; `SafeReader` runs nothing that stands in it.

    Args:
        path: the folder that has `.metadata`.

    Returns:
        The tensors by their names in the model, without the prefix "model." that accelerate adds
        and without the names that activation checkpointing adds.

    Raises:
        ValueError: if the folder is damaged, or holds no tensor.
    """
    try:
        reader = SafeReader(path)
        known = reader.read_metadata().state_dict_metadata
        wanted = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in known.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():  # one process is what is meant here
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(wanted, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        failures = getattr(error, "failures", {}).values()
        cause = next((wrapped[0] for wrapped in failures), error)
        raise ValueError(
            f"{path} is no whole distributed checkpoint ({type(cause).__name__}: {cause}); fold "
            "another one"
        ) from error
    if not wanted:
        raise ValueError(f"{path} holds no tensors; give the folder of the model's weights")
    if all(name.startswith(_MODEL_PREFIX) for name in wanted):
        wanted = {name.removeprefix(_MODEL_PREFIX): tensor for name, tensor in wanted.items()}
    return {state_dict_name(name): tensor for name, tensor in wanted.items()}


def save_folded(tensors: Mapping[str, Tensor], config: str, output: Folder) -> int:
    """Write raw weights as the plain model of a config: `save_pretrained` of what they fold to.

    Args:
        tensors: raw state dict under the model's own names; gamma, sigma, u, v where patched.
        config: folder, file or name on the Hub of the config.json that belongs to them; its
            `architectures` names the class.
        output: folder to write.

    Returns:
        The number of layers that were folded, 0 for a plain model.

    Raises:
        ValueError: if the config names no class, or its model has other tensors or shapes.
    """
    model = empty_model(config)
    layers = [name.removesuffix(".sigma_u") for name in tensors if name.endswith(".sigma_u")]
    beside = (*SigmaLayer.SIGMA_TENSORS, PARTS_TENSOR)
    extra = {f"{layer}.{part}" for layer in layers for part in beside}
    plain = {name: tensor for name, tensor in tensors.items() if name not in extra}
    for layer in layers:
        weight, u = plain.pop(f"{layer}.weight"), tensors[f"{layer}.sigma_u"]
        scale = tensors[f"{layer}.gamma"] / tensors[f"{layer}.sigma"]
        parts = parts_of_stored(weight.shape, u.shape, tensors.get(f"{layer}.{PARTS_TENSOR}"))
        plain[plain_weight_name(layer, parts)] = scale_parts(weight, scale, parts)
    _check(model, plain, config)
    for name, source in model.all_tied_weights_keys.items():
        if name in plain and torch.equal(plain[name], plain[source]):
            del plain[name]
    model.save_pretrained(output, state_dict=plain)
    return len(layers)


def lost_norms(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return the parameters of a model's norms that are not among the names of its weights."""
    lacking = sorted(set(model.state_dict()) - set(names))
    owners = {name: type(model.get_submodule(name.rpartition(".")[0])) for name in lacking}
    return [name for name, owner in owners.items() if "Norm" in owner.__name__]


def lost_norms_error(model: PreTrainedModel, lost: list[str]) -> ValueError:
    """Return the error for weights that a plain folder would give fresh norms."""
    return ValueError(
        f"the checkpoint lacks {len(lost)} vectors of a {type(model).__name__} (first: "
        f"{lost[0]!r}): its LayerNorms seem to be removed, which a plain config cannot say. "
        "Resume it with the Trainer and call hf_stable.export, which writes what loads it"
    )


def _check(model: PreTrainedModel, plain: Mapping[str, Tensor], config: str) -> None:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    lacking = sorted(set(shapes) - set(plain) - tied)
    surplus = sorted(set(plain) - set(shapes))
    if lacking and not surplus and lost_norms(model, plain) == lacking:
        raise lost_norms_error(model, lacking)
    if lacking or surplus:
        what = f"the checkpoint has no {lacking[0]!r}" if lacking else f"it has no {surplus[0]!r}"
        raise ValueError(
            f"the config in {config!r} makes another model, a {type(model).__name__}: {what}. Give "
            "the config of the model that was trained"
        )
    for name, shape in shapes.items():
        if name in plain and plain[name].shape != shape:
            raise ValueError(
                f"the config in {config!r} makes another model: {name!r} has the shape "
                f"{tuple(shape)} in it and {tuple(plain[name].shape)} in the checkpoint"
            )

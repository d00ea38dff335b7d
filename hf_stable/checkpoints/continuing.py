"""Continuing a patched model from what was saved of it: exactly, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_stable._file_names import SIDECAR_FILE
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.checkpoints.provenance import restore_provenance
from hf_stable.checkpoints.sidecar import WAY_OUT, SavedState, read_state
from hf_stable.methods.config import CONFIGS_ATTRIBUTE
from hf_stable.methods.layernorms.removal import RemovalConfig
from hf_stable.methods.layernorms.standalone import standalone_class
from hf_stable.methods.patching import patch_configs
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import SigmaReparamPlan, sigma_layers
from hf_stable.methods.sigma_reparam.swapping import SIGMA_CLASSES, SigmaState, check_plain
from hf_stable.methods.undoing import undoing

__all__ = ["load", "restoring"]

Folder = str | os.PathLike[str]


def load(model_class: Any, path: Folder, **kwargs: Any) -> Any:
    """Load a patched model from a folder that it was saved to, to continue training it.

    Args:
        model_class: a model class or an auto class of transformers.
        path: a local folder with a sidecar. (For a folder without, or a name on the Hub, use
            `from_pretrained` and `hf_stable.patch`.)
        **kwargs: for `from_pretrained`.

    Returns:
        The model, in evaluation mode, with the raw weights, gamma, sigma, u and v as saved. One
        without LayerNorms is of a class of `modeling_hf_stable`, derived from the one given.

    Raises:
        FileNotFoundError: if there is no sidecar.
        ValueError: if a file is damaged, or the sidecar belongs to other weights.
        UnsupportedModelError: if a saved layer is not in the model, or its weight is offloaded.
    """
    saved = read_state(path)
    removal = any(isinstance(config, RemovalConfig) for config in saved.configs)
    if removal and isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        model_class = standalone_class(model_class)
    with _naming_damaged_weights(path):
        model = model_class.from_pretrained(path, **kwargs)
    layers = []
    for key in saved.layers:
        name, module = _find_layer(model, key, saved)
        check_plain(module, name)
        block_dim = 1 if isinstance(module, Conv1D) else 0
        saved.check_folds_to(module.weight, key, block_dim)
        # Copies, for what safetensors hands out lies unaligned in the memory of the file.
        device = module.weight.device
        parts = {part: t.to(device, copy=True) for part, t in saved.layer(key).items()}
        with torch.no_grad():
            module.weight.copy_(parts.pop("weight"))
        gamma, sigma, u, v = (parts[part] for part in SigmaLayer.SIGMA_TENSORS)
        layers.append((module, SigmaState(gamma, sigma, u, v, block_dim, name)))
    with undoing() as undo:
        SigmaReparamPlan(tuple(layers)).apply(undo)
    setattr(model, CONFIGS_ATTRIBUTE, saved.configs)
    restore_provenance(model, saved.provenance)
    return model


@contextmanager
def restoring(model: nn.Module, folder: Folder, rename: Callable[[str], str]) -> Iterator[None]:
    """Make `model.load_state_dict` take the files of a checkpoint, exactly, inside this context.

    Keys are renamed from those on disk to those in memory. For a patched model, folded weights
    are replaced by the raw ones of the sidecar, and gamma, sigma, u and v join them.

    Args:
        model: a plain or patched model of the checkpoint's architecture.
        folder: the checkpoint.
        rename: gives the name in memory of a key on disk.

    Raises:
        FileNotFoundError: if the model is patched and there is no sidecar.
        ValueError: if the model is plain and there is one, if a file is damaged or of another
            save or config, or if not everything of a patched model was in the checkpoint.
    """
    saved = _state_for(model, folder)
    names = set(model.state_dict())
    loaded: set[str] = set()

    def before_loading(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        _rename_keys(state_dict, names, rename)
        if saved is not None:
            for name, layer in sigma_layers(model):
                if f"{name}.weight" in state_dict:
                    saved.check_folds_to(state_dict[f"{name}.weight"], name, layer.block_dim)
                    parts = saved.layer(name).items()
                    state_dict.update({f"{name}.{part}": tensor for part, tensor in parts})
        loaded.update(state_dict)

    hook = model.register_load_state_dict_pre_hook(before_loading)
    try:
        with _naming_damaged_weights(folder):
            yield
    finally:
        hook.remove()
    missing = _not_loaded(model, loaded)
    if saved is not None and missing:
        raise ValueError(
            f"{os.fspath(folder)} lacks {len(missing)} tensors of this {type(model).__name__} "
            f"(first: {missing[0]!r}), which would start anew. {WAY_OUT}"
        )


@contextmanager
def _naming_damaged_weights(folder: Folder) -> Iterator[None]:
    """Turn safetensors' error, which names no file, into one that names the folder."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"a weights file in {os.fspath(folder)} is truncated or damaged ({error}); load "
            "another checkpoint"
        ) from error


def _find_layer(model: nn.Module, key: str, saved: SavedState) -> tuple[str, Any]:
    """Find a saved layer in a model that may lack, or add, the prefix of the base model."""
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name in (key, key.removeprefix(prefix), prefix + key):
        if type(modules.get(name)) in SIGMA_CLASSES:
            return name, modules[name]
    raise UnsupportedModelError(
        f"{saved.path} holds {key!r}, which is no plain layer of this {type(model).__name__}; "
        "load it with the class that config.json names under 'architectures'"
    )


def _state_for(model: nn.Module, folder: Folder) -> SavedState | None:
    """Read and check the sidecar that a model needs, before anything of the model changes."""
    path = os.path.join(folder, SIDECAR_FILE)
    names = [name for name, _ in sigma_layers(model)]
    if not names and not patch_configs(model):
        if os.path.isfile(path):
            raise ValueError(
                f"{path} shows that a patched model was saved here, but this "
                f"{type(model).__name__} is plain: its weights would be the folded ones, and the "
                "optimizer's state would not fit. Call hf_stable.patch with the same config "
                "before the Trainer is built; to go on without, remove the file"
            )
        return None
    saved, configs = read_state(folder), patch_configs(model)
    if saved.configs != configs:
        raise ValueError(
            f"{path} was written for another config: it holds {_listed(saved.configs)}, but the "
            f"model is patched with {_listed(configs)}. Patch with what it holds to continue it. "
            f"{WAY_OUT}"
        )
    odd = sorted(set(names) ^ set(saved.layers))
    if odd:
        raise ValueError(
            f"{path} was written for other layers: {odd[0]!r} is in only one of checkpoint and "
            f"model. {WAY_OUT}"
        )
    return saved


def _listed(configs: tuple[Any, ...]) -> str:
    return ", ".join(map(str, configs)) or "none"


def _rename_keys(state_dict: dict[str, Any], names: set[str], rename: Callable[[str], str]) -> None:
    renamed = {}
    for key, value in state_dict.items():
        name = rename(key)
        renamed[name if name in names else key] = value
    state_dict.clear()
    state_dict.update(renamed)


def _not_loaded(model: nn.Module, loaded: set[str]) -> list[str]:
    """Return the names that no loaded key, nor one tied to them, has filled."""
    tensors = model.state_dict(keep_vars=True)
    filled = {id(tensor) for name, tensor in tensors.items() if name in loaded}
    return [name for name, tensor in tensors.items() if id(tensor) not in filled]

"""Continuing a training from a checkpoint: what is loaded reaches a patched model exactly.

A checkpoint has plain weights, and beside them a sidecar with what folding lost. Inside the
contexts here, `load_state_dict` takes the one for the other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from hf_stable._file_names import SIDECAR_FILE
from hf_stable._wording import nearest
from hf_stable.architectures.paths import plain_name
from hf_stable.checkpoints.saved_state import WAY_OUT, Configs, SavedState
from hf_stable.checkpoints.sidecar import read_state
from hf_stable.checkpoints.weight_files import open_weights
from hf_stable.methods.patching import configs_by_part, patch_configs
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.stored_parts import plain_weight_name

__all__ = ["naming_damaged_weights", "restoring", "restoring_where_possible"]

Folder = str | os.PathLike[str]


@contextmanager
def restoring(
    model: nn.Module,
    folder: Folder,
    convert: Callable[[dict[str, Any]], dict[str, Any]],
    unsaved: Collection[str] = (),
) -> Iterator[None]:
    """Make `model.load_state_dict` take the files of a checkpoint, exactly, inside this context.

    Keys and tensors on disk become those in memory. For a patched model, folded weights
    are replaced by the raw ones of the sidecar, and gamma, sigma, u and v join them.

    Args:
        model: a plain or patched model of the checkpoint's architecture, or a module that holds
            one, compiled or not.
        folder: the checkpoint.
        convert: gives the tensors in memory for those on disk (`KeyConversion`), by names without
            what torch.compile adds.
        unsaved: names in memory of what the model makes itself, so that no file has it.

    Raises:
        FileNotFoundError: if there is no such folder, or the model is patched and there is no
            sidecar.
        ValueError: if the model is plain and there is one, if a file is damaged or of another
            save or config, or if not everything of a patched model was in the checkpoint.
    """
    saved = _state_for(model, folder)
    names = {plain_name(name): name for name in model.state_dict()}
    for name, layer in sigma_layers(model):
        names.setdefault(plain_weight_name(plain_name(name), layer.parts), f"{name}.weight")
    loaded: set[str] = set()
    # In the place of a norm that was removed, a file may have a guard against other classes.
    guards = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Identity)}

    def before_loading(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        converted = convert({plain_name(key): tensor for key, tensor in state_dict.items()})
        state_dict.clear()
        state_dict.update({names.get(key, key): tensor for key, tensor in converted.items()})
        for name in guards & state_dict.keys():
            del state_dict[name]
        loaded.update(state_dict)

    with ExitStack() as hooks:
        hook = model.register_load_state_dict_pre_hook(before_loading)
        hooks.callback(hook.remove)
        if saved is not None:
            for name, layer in sigma_layers(model):
                take = _taking_raw(saved, plain_name(name), name, loaded)
                hooks.callback(layer.register_load_state_dict_pre_hook(take).remove)
        with naming_damaged_weights(folder):
            yield
    loaded.update(names[name] for name in unsaved if name in names)
    missing = _not_loaded(model, loaded)
    if saved is not None and missing:
        raise ValueError(
            f"{os.fspath(folder)} lacks {len(missing)} tensors of this {type(model).__name__} "
            f"(first: {missing[0]!r}), which would start anew. {WAY_OUT}"
        )


@contextmanager
def restoring_where_possible(model: nn.Module, folder: Folder) -> Iterator[None]:
    """Use the sidecars of a folder for whatever is loaded into a patched model in this context.

    For a Trainer that reads checkpoints its own way. It may keep models in subfolders and give
    them other names, so a layer's raw weight is found by what it folds to. What fits no sidecar
    is taken as plain weights, with a warning: the training goes on, but not exactly.

    Args:
        model: a patched model, or a module that holds one.
        folder: the checkpoint.
    """
    layers = dict(sigma_layers(model))
    states, problem = _read_states(folder) if layers else ([], "")
    plain: list[str] = []

    with ExitStack() as hooks:
        for name, layer in layers.items():
            take = _taking_what_fits(states, plain_name(name), plain)
            hooks.callback(layer.register_load_state_dict_pre_hook(take).remove)
        yield
    if plain:
        problem = problem or f"their raw weights are in no {SIDECAR_FILE} there"
        warnings.warn(
            f"{len(plain)} patched layers (first: {plain[0]!r}) go on from the folded weights in "
            f"{os.fspath(folder)}: {problem}. They compute what they computed, but the training is "
            "not continued exactly",
            UserWarning,
            stacklevel=4,
        )


@contextmanager
def naming_damaged_weights(folder: Folder) -> Iterator[None]:
    """Turn safetensors' error, which names no file, into one that names the folder."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"a weights file in {os.fspath(folder)} is truncated or damaged ({error}); load "
            "another checkpoint"
        ) from error


Hook = Callable[..., None]


def _taking_raw(saved: SavedState, saved_name: str, name: str, loaded: set[str]) -> Hook:
    """Return the hook of a layer that puts its raw tensors in the place of the folded weight."""

    def hook(layer: SigmaLayer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and f"{prefix}gamma" not in state_dict:
            saved.check_folds_to(weight, saved_name)
            _put(state_dict, prefix, saved, saved_name)
        parts = ("weight", *layer.sigma_tensors)
        loaded.update(f"{name}.{part}" for part in parts if f"{prefix}{part}" in state_dict)

    return hook


def _taking_what_fits(states: list[SavedState], name: str, plain: list[str]) -> Hook:
    """Return the hook of a layer that does the same with the first sidecar that fits."""
    candidates = [
        (saved, key)
        for saved in states
        for key in saved.layers
        if name == key or name.endswith(f".{key}")
    ]

    def hook(layer: SigmaLayer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is None or f"{prefix}gamma" in state_dict:
            return
        for saved, key in candidates:
            if saved.folds_to(weight, key):
                return _put(state_dict, prefix, saved, key)
        plain.append(name)

    return hook


def _put(state_dict: dict[str, Any], prefix: str, saved: SavedState, key: str) -> None:
    state_dict.update({f"{prefix}{part}": tensor for part, tensor in saved.layer(key).items()})


def _read_states(folder: Folder) -> tuple[list[SavedState], str]:
    """Read the sidecars in a folder and in its folders, and say what is wrong with one that is."""
    states, problem = [], ""
    for path in sorted(Path(folder).glob(f"**/{SIDECAR_FILE}")):
        try:
            states.append(read_state(path.parent))
        except ValueError as error:
            problem = str(error)
    return states, problem


def _state_for(model: nn.Module, folder: Folder) -> SavedState | None:
    """Read and check the sidecar that a model needs, before anything of the model changes."""
    path = os.path.join(folder, SIDECAR_FILE)
    names = [plain_name(name) for name, _ in sigma_layers(model)]
    if not names and not patch_configs(model):
        if os.path.isfile(path):
            raise ValueError(
                f"{path} shows that a patched model was saved here, but this "
                f"{type(model).__name__} is plain: its weights would be the folded ones, and the "
                "optimizer's state would not fit. Call hf_stable.patch with the same config "
                "before the Trainer is built; to go on without, remove the file"
            )
        return None
    if not os.path.isfile(path) and _holds_raw_weights(model, folder):
        return None
    saved, parts = read_state(folder), configs_by_part(model)
    if not _are_same(saved.parts, parts):
        raise ValueError(
            f"{path} was written for another config: it holds {_listed(saved.parts)}, but the "
            f"model is patched with {_listed(parts)}. Patch with what it holds to continue it. "
            f"{WAY_OUT}"
        )
    odd = sorted(set(names) ^ set(saved.layers))
    if odd:
        raise ValueError(
            f"{path} was written for other layers: {odd[0]!r} is in only one of checkpoint and "
            f"model. {WAY_OUT}"
        )
    return saved


def _are_same(saved: Configs, parts: Configs) -> bool:
    # Older sidecars name no parts, and what was patched whole may be patched part by part.
    return saved == parts or len({*saved.values(), *parts.values()}) == 1


def _holds_raw_weights(model: nn.Module, folder: Folder) -> bool:
    """Say whether a folder without a sidecar can continue a patched model all the same.

    Raises:
        FileNotFoundError: if it cannot, saying what it is instead.
        ValueError: likewise, if it holds no weights or damaged ones.
    """
    path = Path(folder)
    if not path.is_dir():
        siblings = [each.name for each in path.parent.glob("*/")] if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"there is no checkpoint {os.fspath(folder)!r}{nearest(path.name, siblings)}; give the "
            "path of a folder checkpoint-N of the run"
        )
    if open_weights(path).raw_layers:
        return True
    raise FileNotFoundError(
        f"{os.fspath(folder)} was saved by a model that is not patched ({SIDECAR_FILE} is missing "
        f"in it): gamma and the raw weights, from which this patched {type(model).__name__} would "
        "continue, are nowhere. To continue the plain run, leave the patch out; to start a patched "
        "run from its weights, load them with from_pretrained, call hf_stable.patch, and do not "
        "resume"
    )


def _listed(parts: Configs) -> str:
    return (
        "; ".join(
            f"{name}: {listed}" if name else listed
            for name, configs in parts.items()
            if (listed := ", ".join(map(str, configs)))
        )
        or "none"
    )


def _not_loaded(model: nn.Module, loaded: set[str]) -> list[str]:
    """Return the names that no loaded key, nor one tied to them, has filled."""
    tensors = model.state_dict(keep_vars=True)
    filled = {id(tensor) for name, tensor in tensors.items() if name in loaded}
    return [name for name, tensor in tensors.items() if id(tensor) not in filled]

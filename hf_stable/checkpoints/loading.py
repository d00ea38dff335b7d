"""Loading a patched model from a folder that it was saved to, to continue training it."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_stable._ranks import failing_together, gathered, is_divided, whole_shape
from hf_stable.architectures.paths import owner_of
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.checkpoints.continuing import naming_damaged_weights
from hf_stable.checkpoints.described_models import implementations, read_config
from hf_stable.checkpoints.provenance import restore_provenance
from hf_stable.checkpoints.saved_state import SavedState
from hf_stable.checkpoints.sidecar import read_state
from hf_stable.measures.parts import Parts
from hf_stable.methods.config import CONFIGS_ATTRIBUTE
from hf_stable.methods.layernorms.removal import RemovalConfig
from hf_stable.methods.layernorms.standalone import config_without_norms, standalone_class
from hf_stable.methods.sigma_reparam.method import SigmaReparamConfig
from hf_stable.methods.sigma_reparam.planning import SigmaReparamPlan, choose_layers, plan_layers
from hf_stable.methods.sigma_reparam.swapping import SigmaState, check_plain, sigma_class_of
from hf_stable.methods.sigma_reparam.triples import SIGMA_TENSORS
from hf_stable.methods.undoing import undoing

__all__ = ["load"]

Folder = str | os.PathLike[str]


def load(model_class: Any, path: Folder, **kwargs: Any) -> Any:
    """Load a patched model from a folder that it was saved to, to continue training it.

    A class with another head than the one that was saved takes what fits. What is new in it starts
    as `from_pretrained` starts it, and is patched where the saved config says so; a warning names
    what is new and what was left out.

    Args:
        model_class: a model class or an auto class of transformers.
        path: a local folder with a sidecar. (For a folder without, or a name on the Hub, use
            `from_pretrained` and `hf_stable.patch`.)
        **kwargs: for `from_pretrained`.

    Returns:
        The model, in evaluation mode, with the raw weights, gamma, sigma, u and v as saved. One
        without LayerNorms is of a class of `modeling_hf_stable`, derived from the one given. With
        `output_loading_info=True` a pair of it and what `from_pretrained` says of the loading.

    Raises:
        FileNotFoundError: if there is no sidecar.
        ValueError: if a file is damaged, or the sidecar belongs to other weights.
        UnsupportedModelError: if none of the saved layers is in the model, or its weights are
            offloaded.
    """
    saved = read_state(path)
    removal = any(isinstance(c, RemovalConfig) for configs in saved.parts.values() for c in configs)
    if removal and isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        model_class = standalone_class(model_class)
    options = _options_for(path, removal, kwargs)
    with naming_damaged_weights(path):
        loaded = model_class.from_pretrained(path, **options)
    model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
    placing = _place(model, saved, bool(kwargs.get("ignore_mismatched_sizes")))
    new = _plan_new_layers(model, saved, placing)
    with undoing() as undo:
        for plan in (placing.plan, *new):
            plan.apply(undo)
    for part, configs in saved.parts.items():
        if (module := _find_part(model, part)) is not None:
            setattr(module, CONFIGS_ATTRIBUTE, configs)
    restore_provenance(model, saved.provenance)
    _tell_what_differs(model, saved, placing, new)
    return (model, *info) if info else model


@dataclass
class _Placing:
    """Where saved layers go: what is computed before the first layer changes."""

    states: list[tuple[nn.Module, SigmaState]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def plan(self) -> SigmaReparamPlan:
        return SigmaReparamPlan(tuple(self.states))

    @property
    def names(self) -> set[str]:
        return {state.name for _, state in self.states}


@torch.no_grad()
def _place(model: nn.Module, saved: SavedState, may_differ: bool) -> _Placing:
    """Find the layers that a model shares with a sidecar, and give them the raw weights.

    Args:
        model: plain, with the folded weights.
        saved: the sidecar.
        may_differ: whether a layer of another size counts as another layer.
    """
    placing, is_shared = _Placing(), any(map(is_divided, model.parameters()))
    for key in saved.layers:
        with failing_together(is_shared):  # each rank reads the file
            tensors, parts = saved.layer(key), saved.parts_of(key)
        module: Any
        name, module, parameter = _find_place(model, key, parts) or ("", None, "")
        weight: Any = getattr(module, parameter, None)
        if weight is None or (may_differ and whole_shape(weight) != tensors["weight"].shape):
            placing.left_out.append(key)
            continue
        check_plain(module, name, parameter)
        with gathered(weight, written=True), failing_together(is_shared):
            saved.check_folds_to(weight, key)
            # Copies, for what safetensors hands out lies unaligned in the memory of the file.
            own = {part: tensor.to(weight.device, copy=True) for part, tensor in tensors.items()}
            weight.copy_(own["weight"])
        gamma, sigma, u, v = (own[part] for part in SIGMA_TENSORS)
        if not parts.stacked:
            parts = replace(parts, dim=1 if isinstance(module, Conv1D) else 0)
        iterations = _power_iterations(saved, key)
        state = SigmaState(gamma, sigma, u, v, parts, name, iterations, parameter)
        placing.states.append((module, state))
    if saved.layers and not placing.states:
        raise UnsupportedModelError(
            f"{saved.path} holds {saved.layers[0]!r}, which is no plain layer of this "
            f"{type(model).__name__}, and no other of its layers is either; load it with the class "
            "that config.json names under 'architectures'"
        )
    return placing


def _power_iterations(saved: SavedState, key: str) -> int:
    """Return how many a layer takes after a step, by the config of the part that it is in."""
    for part, configs in saved.parts.items():
        if not part or key.startswith(f"{part}."):
            for config in configs:
                if isinstance(config, SigmaReparamConfig):
                    return config.power_iterations
    return SigmaReparamConfig().power_iterations


def _find_place(model: nn.Module, key: str, parts: Parts) -> tuple[str, Any, str] | None:
    """Return the name in a plain model of something saved, its module, and the weight's name."""
    for name in _possible_names(model, key):
        owner = owner_of(model, name)
        target = getattr(*owner) if owner is not None else None
        if owner is not None and parts.stacked and isinstance(target, nn.Parameter):
            return name, *owner
        if target is not None and sigma_class_of(type(target)) is not None:
            return name, target, "weight"
    return None


def _possible_names(model: nn.Module, key: str) -> tuple[str, ...]:
    """Return the names that something saved may have in a model of another head, or of none."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return key, key.removeprefix(prefix), prefix + key


def _find_part(model: nn.Module, name: str) -> nn.Module | None:
    modules = dict(model.named_modules())
    if name in ("", getattr(model, "base_model_prefix", None)) and name not in modules:
        return model
    return next((modules[n] for n in _possible_names(model, name) if n in modules), None)


def _plan_new_layers(
    model: nn.Module, saved: SavedState, placing: _Placing
) -> list[SigmaReparamPlan]:
    """Plan the layers that the saved config patches but the sidecar does not have."""
    plans: list[SigmaReparamPlan] = []
    named: Any = model.config.architectures if isinstance(model, PreTrainedModel) else None
    if named == [type(model).__name__] and not placing.left_out:
        return plans  # the same class has the same layers
    known = {(id(placed), state.parameter) for placed, state in placing.states}
    for part, configs in saved.parts.items():
        module = _find_part(model, part)
        for config in configs:
            if module is None or not isinstance(config, SigmaReparamConfig):
                continue
            new = [
                each
                for each in choose_layers(module, config)[0]
                if (id(each.module), each.parameter) not in known
            ]
            plans.append(plan_layers(new, config))
    return plans


def _options_for(path: Folder, removal: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `from_pretrained`, with a config where the folder's own is no good."""
    given = options.get("config")
    if removal and given is not None:
        return options | {"config": config_without_norms(given, read_config(path))}
    if given is None and (ignored := implementations(path)):
        if "attn_implementation" not in options:
            warnings.warn(
                f"the config in {os.fspath(path)} asks for {', '.join(ignored)}, which is ignored; "
                "pass attn_implementation=... for another than the default",
                UserWarning,
                stacklevel=3,
            )
        return options | {"config": read_config(path)}
    return options


def _tell_what_differs(
    model: nn.Module, saved: SavedState, placing: _Placing, new: list[SigmaReparamPlan]
) -> None:
    added = [state.name for plan in new for _, state in plan.states]
    if not added and not placing.left_out:
        return
    sentences = [f"{saved.path} was saved by another model than this {type(model).__name__}"]
    if placing.left_out:
        sentences.append(
            f"left out, for this one has none of that name and size: {_some(placing.left_out)}"
        )
    if added:
        sentences.append(f"new, and patched as they were initialised: {_some(added)}")
    warnings.warn("; ".join(sentences), UserWarning, stacklevel=3)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown

"""Patch a model in place and undo it: resolve and validate everything, then mutate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn

from hf_stable._file_names import SIDECAR_FILE
from hf_stable._late_changes import make_late_changes
from hf_stable._ranks import failing_together, is_divided
from hf_stable._wording import nearest
from hf_stable.architectures.paths import join, plain_name
from hf_stable.architectures.registry import require_model
from hf_stable.methods.agreement import (
    note_patch,
    refuse_different_configs,
    refuse_different_patches,
)
from hf_stable.methods.config import (
    CONFIGS_ATTRIBUTE,
    MethodConfig,
    remember_folded,
    take_out_configs,
)
from hf_stable.methods.layernorms.removal import (
    RemovalConfig,
    RemoveLayerNormConfig,
    RemovePreLayerNormConfig,
    plan_removal,
    removed_norms,
)
from hf_stable.methods.layernorms.standalone import is_standalone
from hf_stable.methods.patchable_models import refuse_unpatchable
from hf_stable.methods.sigma_reparam.folding import fold_layer
from hf_stable.methods.sigma_reparam.method import SigmaReparamConfig, sigma_layers
from hf_stable.methods.sigma_reparam.planning import plan_sigma_reparam
from hf_stable.methods.sigma_reparam.triples import settle
from hf_stable.methods.undoing import Undo, keep_attributes, undoing

__all__ = ["METHODS", "configs_by_part", "fold", "is_patched", "patch", "patch_configs"]


class PatchPlan(Protocol):
    """A validated change of a model that has not been made yet."""

    def apply(self, undo: Undo) -> None:
        """Make the change; `undo` gains what takes it back."""


METHODS: dict[str, tuple[type[MethodConfig], Callable[[nn.Module, Any], PatchPlan]]] = {
    SigmaReparamConfig.method: (SigmaReparamConfig, plan_sigma_reparam),
    RemovePreLayerNormConfig.method: (RemovePreLayerNormConfig, plan_removal),
    RemoveLayerNormConfig.method: (RemoveLayerNormConfig, plan_removal),
}
"""Every patch method: its options, and the function that validates them against a model."""

Method = str | MethodConfig


def patch(model: nn.Module, method: Method | Sequence[Method], **options: Any) -> nn.Module:
    """Patch a transformers model in place.

    Everything is resolved and computed before the first layer changes, and what fails later is
    undone: if this raises, whatever the cause, the model is as it was. Patching again with the same
    config does nothing, but for layers and norms that are plain: those of other parts, and what was
    put in since.

    Args:
        model: a supported `PreTrainedModel`, before its parameters are collected for an optimizer's
            groups and before it is wrapped, sharded or compiled.
        method: a method's name, its config, or a sequence of such, applied together.
        **options: fields of the config, where `method` is a single name.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if the architecture is not registered, or the model is on the meta
            device (offloaded, too), sharded, wrapped, compiled, quantised or adapted, or something
            other than accelerate's hooks has replaced the forward of a layer.
        ValueError: for an unknown method or option, no matching layer, a zero or non-finite
            matrix, or a model that is patched by the same method with another config, or
            differently by ranks that share its weights.
        TypeError: if a layer is of a type that cannot be reparametrised.
    """
    make_late_changes()
    configs = _resolve(method, options)
    require_model(model, "patch")
    note_patch()
    refuse_unpatchable(model)
    present = {config.method: config for config in patch_configs(model)}
    refuse_different_configs(model, configs, present.values())
    _refuse_other_configs(model, configs)
    missing = [config for config in configs if config.method not in present]
    plans: list[PatchPlan] = []
    for config in configs:  # a comprehension has a frame of its own, which warnings would name
        plans.append(METHODS[config.method][1](model, config))
    if missing:
        _warn_if_continuing(model)
    if any(isinstance(config, SigmaReparamConfig) for config in missing):
        _warn_if_begun(model)
    present |= {config.method: config for config in missing}
    with undoing() as undo:
        undo.append(keep_attributes(model))
        for plan in plans:
            plan.apply(undo)
        # In the table's order, whichever was asked for first: a checkpoint is compared by them.
        in_force = tuple(present[name] for name in METHODS if name in present)
        setattr(model, CONFIGS_ATTRIBUTE, in_force)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Turn every sigma layer of a model into the plain layer that computes the same, in place.

    `weight <- gamma / sigma * W`, rounded once to the weight's dtype. The weight parameters stay
    the same objects; gamma and the singular vectors go. A plain model comes back unchanged.

    It works inside wrappers (PEFT, DDP, FSDP2). DDP and FSDP2 keep lists of gammas and buffers of
    their own, so wrap the model anew before it runs again. Removed norms stay removed, and a
    warning says so: a norm is no weight that could be folded.

    The model is folded whole or not at all: where Ctrl-C or a lack of memory comes in between, it
    is as it was. The raw weights are kept on the CPU until all is done. Every rank of a sharded
    model has to call it; where one of them fails, all do.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if accelerate offloads a weight. Nothing has changed then.
        ValueError: if ranks that share the weights have patched the model differently.
        RuntimeError: if another rank that shares them has failed, naming it.
    """
    require_model(model, "fold")
    layers = [layer for _, layer in sigma_layers(model)]
    is_shared = any(map(is_divided, model.parameters()))
    if is_shared:
        refuse_different_patches(model)
    for layer in layers:
        settle(layer)
    with undoing() as undo:
        for layer in layers:
            fold_layer(layer, undo)
        with failing_together(is_shared):
            remember_folded(model, SigmaReparamConfig, undo)
            take_out_configs(model, SigmaReparamConfig, undo)
    if removed := removed_norms(model):
        warnings.warn(
            f"fold keeps the {len(removed)} removed LayerNorms removed: the model is no plain one "
            "yet. hf_stable.restore_layernorms brings them back, untrained since",
            UserWarning,
            stacklevel=2,
        )
    elif any(map(is_standalone, model.modules())):
        warnings.warn(
            "fold keeps the LayerNorms removed that this model was loaded without: it is no plain "
            "one, and hf_stable.export writes what loads it",
            UserWarning,
            stacklevel=2,
        )
    return model


def is_patched(model: nn.Module) -> bool:
    """Say whether any method is in force in the model, a part of one, or one inside a wrapper."""
    return bool(patch_configs(model) or sigma_layers(model))


def patch_configs(model: nn.Module) -> tuple[MethodConfig, ...]:
    """Return the configs in force in a model, or in the model inside a wrapper."""
    for module in model.modules():
        configs = getattr(module, CONFIGS_ATTRIBUTE, ())
        if configs:
            return configs
    return ()


def configs_by_part(model: nn.Module) -> dict[str, tuple[MethodConfig, ...]]:
    """Return the configs in force by the name of the module that was patched, "" for the model.

    A part that was patched before the whole, with the same configs, is left out. A model that
    torch.compile has wrapped counts as the model itself.
    """
    found = {
        plain_name(name): module.__dict__[CONFIGS_ATTRIBUTE]
        for name, module in model.named_modules()
        if module.__dict__.get(CONFIGS_ATTRIBUTE)
    }
    return {
        name: configs
        for name, configs in found.items()
        if not any(
            other != name and f"{name}.".startswith(join(other, "")) and found[other] == configs
            for other in found
        )
    }


def _resolve(method: Method | Sequence[Method], options: dict[str, Any]) -> list[MethodConfig]:
    """Return one config for each method that was asked for."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(
                f"unknown method {method!r}{nearest(method, METHODS)}; the methods are "
                f"{', '.join(METHODS)}"
            )
        return [METHODS[method][0].from_dict(options)]
    if options:
        raise TypeError("options by keyword go with a method's name, not with a config")
    if isinstance(method, MethodConfig):
        return [method]
    if not isinstance(method, Sequence) or not method:
        raise TypeError(
            f"method must be a name, a config or a non-empty sequence of them, got {method!r}"
        )
    configs = [config for each in method for config in _resolve(each, {})]
    names = [config.method for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"each method may be named once, got {', '.join(names)}")
    return configs


def _refuse_other_configs(model: nn.Module, configs: Sequence[MethodConfig]) -> None:
    """Raise where the model, or a part of it, is patched by one of the methods in another way."""
    for part, in_force in configs_by_part(model).items():
        for config in configs:
            for other in in_force:
                if other.method == config.method and other != config:
                    raise ValueError(
                        f"{f'{part!r} of ' if part else ''}the model is patched already, with "
                        f"{other}; to patch it with {config}, {_way_to_undo(model, config)}"
                    )


def _way_to_undo(model: nn.Module, config: MethodConfig) -> str:
    """Say how to get rid of the config of a method that is in force."""
    if not isinstance(config, RemovalConfig):
        return "undo that first (hf_stable.fold)"
    if removed_norms(model):
        return "undo that first (hf_stable.restore_layernorms)"
    return "start from a model with its norms: no file has those of this one"


def _warn_if_continuing(model: nn.Module) -> None:
    folder = getattr(model, "name_or_path", "")
    if folder and os.path.isfile(os.path.join(folder, SIDECAR_FILE)):
        warnings.warn(
            f"{folder} holds the state of a patched model ({SIDECAR_FILE}), which this patch "
            "starts anew; to continue it, use hf_stable.load(model_class, path) instead",
            UserWarning,
            stacklevel=3,
        )


def _warn_if_begun(model: nn.Module) -> None:
    if layers := sigma_layers(model):
        warnings.warn(
            f"{len(layers)} layers (first: {layers[0][0]!r}) are reparametrised already, by a "
            "patch of a model that this one is a part of, or that they were taken from. They stay "
            "as they are: their gamma goes on from where it is",
            UserWarning,
            stacklevel=3,
        )

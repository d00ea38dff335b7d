"""Patch a model in place and undo it: resolve and validate everything, then mutate."""

from __future__ import annotations

import difflib
import gc
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_stable.architectures.registry import (
    FoundLayer,
    UnsupportedModelError,
    find_layers,
    lookup,
)
from hf_stable.refreshing import install_hooks
from hf_stable.sigma_layers import SigmaLayer, SigmaState, fold_layer, install, prepare

__all__ = [
    "STATE_FILE",
    "LayerReport",
    "PatchReport",
    "SigmaReparamConfig",
    "describe",
    "fold",
    "is_patched",
    "patch",
    "patch_config",
    "sigma_layers",
]

STATE_FILE = "hf_stable_state.safetensors"
"""The file beside a checkpoint's plain weights that holds raw W, gamma, sigma, u and v."""

CONFIG_ATTRIBUTE = "hf_stable_config"


@dataclass(frozen=True)
class SigmaReparamConfig:
    """sigmaReparam (Zhai et al. 2023): `W_hat = gamma / sigma(W) * W` in every linear layer.

    Attributes:
        init: `"spectral"` starts gamma at sigma(W), so that patching changes no output (for
            pretrained weights); `"one"` starts it at 1, as the paper's text does.
        fused_qkv: `"split"` gives each part of a fused projection a sigma and a gamma of its own;
            `"joint"` one for the whole matrix, as the authors' vision code does.
        heads: `"include"` also reparametrises untied heads.
        include: glob patterns over module names; where given, only these layers.
        exclude: glob patterns over module names, taken out last.
    """

    init: Literal["spectral", "one"] = "spectral"
    fused_qkv: Literal["split", "joint"] = "split"
    heads: Literal["skip", "include"] = "skip"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    method: ClassVar[str] = "sigma_reparam"

    def __post_init__(self) -> None:
        """Check the choices and make the patterns hashable."""
        hints = get_type_hints(type(self))
        for name in ("init", "fused_qkv", "heads"):
            allowed, given = get_args(hints[name]), getattr(self, name)
            if given not in allowed:
                raise ValueError(
                    f"{name}={given!r} is not allowed{_nearest(given, allowed)}; choose one of "
                    f"{', '.join(map(repr, allowed))}"
                )
        for name in ("include", "exclude"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise TypeError(f"{name} takes a sequence of glob patterns, got {given!r}")
            object.__setattr__(self, name, None if given is None else tuple(given))

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> SigmaReparamConfig:
        """Build a config from options by name (a file, a command line, a checkpoint).

        Raises:
            ValueError: for an unknown option, naming the nearest one.
        """
        allowed = [field.name for field in fields(cls)]
        for name in options:
            if name not in allowed:
                raise ValueError(
                    f"unknown option {name!r} of {cls.method}{_nearest(name, allowed)}; its "
                    f"options are {', '.join(allowed)}"
                )
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return asdict(self)


METHODS: dict[str, type[SigmaReparamConfig]] = {SigmaReparamConfig.method: SigmaReparamConfig}

Method = str | SigmaReparamConfig


def patch(model: nn.Module, method: Method | Sequence[Method], **options: Any) -> nn.Module:
    """Patch a transformers model in place.

    Everything is resolved and computed before the first layer changes: if this raises, the model
    is as it was. Patching again with the same config does nothing.

    Args:
        model: a supported `PreTrainedModel`, before any optimizer is built on it and before it is
            wrapped, sharded or compiled.
        method: `"sigma_reparam"`, a `SigmaReparamConfig`, or a sequence of such.
        **options: fields of the config, where `method` is a single name.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if the architecture is not registered, or the model is on the meta
            device, sharded, wrapped, compiled, quantised or adapted.
        ValueError: for an unknown method or option, no matching layer, a zero or non-finite
            matrix, or a model that is patched with another config.
        TypeError: if a layer is of a type that cannot be reparametrised.
    """
    config = _single_config(method, options)
    _refuse_unpatchable(model)
    if is_patched(model):
        if patch_config(model) == config:
            return model
        raise ValueError(
            f"the model is patched already, with {patch_config(model)}; call hf_stable.fold first "
            f"to patch it with {config}"
        )
    chosen, _ = _choose(model, config)
    if not chosen:
        names = [layer.name for layer in find_layers(model, lookup(model))]
        raise ValueError(
            f"no layer left to patch with include={config.include}, exclude={config.exclude}, "
            f"heads={config.heads!r}; the patterns are matched against names such as "
            f"{', '.join(map(repr, names[:3]))}"
        )
    states: list[tuple[nn.Module, SigmaState]] = []
    for layer in chosen:
        num_blocks = layer.num_parts if config.fused_qkv == "split" else 1
        state = prepare(layer.module, num_blocks=num_blocks, init=config.init, name=layer.name)
        states.append((layer.module, state))
    _warn_if_continuing(model)
    install_hooks()
    for module, state in states:
        install(module, state)
    setattr(model, CONFIG_ATTRIBUTE, config)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Turn every sigma layer of a model into the plain layer that computes the same, in place.

    `weight <- gamma / sigma * W`, rounded once to the weight's dtype. The weight parameters keep
    their identity; gamma and the singular vectors go. A plain model comes back unchanged. Works
    inside wrappers (PEFT, DDP, FSDP2): it is the layers that are looked for.

    Returns:
        The same model.
    """
    for _, layer in sigma_layers(model):
        fold_layer(layer)
    for module in model.modules():
        if hasattr(module, CONFIG_ATTRIBUTE):
            delattr(module, CONFIG_ATTRIBUTE)
    return model


def sigma_layers(model: nn.Module) -> list[tuple[str, SigmaLayer]]:
    """Return (name, layer) of every sigma layer, in the order of the model."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, SigmaLayer)]


def is_patched(model: nn.Module) -> bool:
    """Say whether the model holds a sigma layer."""
    return any(isinstance(module, SigmaLayer) for module in model.modules())


def patch_config(model: nn.Module) -> SigmaReparamConfig | None:
    """Return the config that the model (or the model inside a wrapper) was patched with."""
    for module in model.modules():
        config = getattr(module, CONFIG_ATTRIBUTE, None)
        if config is not None:
            return config
    return None


@dataclass(frozen=True)
class LayerReport:
    """One row of a `PatchReport`.

    Attributes:
        name: qualified name of the layer.
        kind: class of the layer.
        shape: shape of its weight, as stored.
        sigma: largest singular value of each block, as last refreshed; empty if not patched.
        gamma: learnable scale of each block; empty if not patched.
        skipped: why the layer is not patched, or None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sigma: tuple[float, ...] = ()
    gamma: tuple[float, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True)
class PatchReport:
    """What is patched in a model and what is not, with the reason; prints as a table."""

    model: str
    config: SigmaReparamConfig | None
    layers: tuple[LayerReport, ...]

    @property
    def num_patched(self) -> int:
        """Return the number of patched layers."""
        return sum(layer.skipped is None for layer in self.layers)

    def __str__(self) -> str:
        """Lay the report out as a plain-text table."""
        rows = [("layer", "kind", "shape", "sigma", "gamma")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            if layer.skipped is None:
                sigma, gamma = (
                    " ".join(f"{value:.4g}" for value in values)
                    for values in (layer.sigma, layer.gamma)
                )
                rows.append((layer.name, layer.kind, shape, sigma, gamma))
            else:
                rows.append((layer.name, layer.kind, shape, f"skipped: {layer.skipped}", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        widths.append(max(len(row[3]) for row in rows if not row[3].startswith("skipped")))
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True))
            for row in rows
        ]
        head = f"{self.model}: {self.num_patched} of {len(self.layers)} layers patched"
        if self.config is not None:
            head += f" by {self.config}"
        return "\n".join([head, *(line.rstrip() for line in lines)])


def describe(model: nn.Module) -> PatchReport:
    """Report every matrix that the model's architecture names: patched, or skipped and why.

    Reads sigma and gamma back to the host.

    Raises:
        UnsupportedModelError: if the architecture is not registered.
    """
    config = patch_config(model)
    reasons = _choose(model, config)[1] if config is not None else {}
    rows = []
    for layer in find_layers(model, lookup(model)):
        module: Any = layer.module
        shape = tuple(module.weight.shape)
        if isinstance(module, SigmaLayer):
            kind = type(module).__name__
            sigma, gamma = tuple(module.sigma.tolist()), tuple(module.gamma.tolist())
            rows.append(LayerReport(layer.name, kind, shape, sigma, gamma))
        else:
            reason = reasons.get(layer.name, "the model is not patched")
            rows.append(LayerReport(layer.name, type(module).__name__, shape, skipped=reason))
    return PatchReport(type(model).__name__, config, tuple(rows))


def _single_config(method: Method | Sequence[Method], options: dict[str, Any]) -> Any:
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(
                f"unknown method {method!r}{_nearest(method, METHODS)}; the methods are "
                f"{', '.join(METHODS)}"
            )
        return METHODS[method].from_dict(options)
    if options:
        raise TypeError("options by keyword go with a method's name, not with a config")
    if isinstance(method, SigmaReparamConfig):
        return method
    if isinstance(method, Sequence) and len(method) == 1:
        return _single_config(method[0], {})
    raise TypeError(
        f"method must be a name, a SigmaReparamConfig or a sequence with one of them, "
        f"got {method!r}"
    )


def _choose(
    model: nn.Module, config: SigmaReparamConfig
) -> tuple[list[FoundLayer], dict[str, str]]:
    """Return the layers to patch, and for every other one the reason."""
    tied = _tied_to(model)
    chosen, reasons = [], {}
    for layer in find_layers(model, lookup(model)):
        weight_name = f"{layer.name}.weight"
        if weight_name in tied:
            reasons[layer.name] = f"tied to {tied[weight_name]}"
        elif "head" in layer.roles and config.heads == "skip":
            reasons[layer.name] = "a head (heads='include' patches it)"
        elif config.include is not None and not _matches(layer.name, config.include):
            reasons[layer.name] = "not in include"
        elif config.exclude is not None and _matches(layer.name, config.exclude):
            reasons[layer.name] = "in exclude"
        else:
            chosen.append(layer)
    return chosen, reasons


def _tied_to(model: nn.Module) -> dict[str, str]:
    """Map the name of every shared parameter to another of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = {
        name: next(other for other in group if other != name)
        for group in names.values()
        for name in group
        if len(group) > 1
    }
    return dict(getattr(model, "all_tied_weights_keys", None) or {}) | shared


def _refuse_unpatchable(model: nn.Module) -> None:
    """Raise for every state of a model in which a patch would be lost or wrong."""
    wrapper = _wrapper_of(model)
    if wrapper is not None:
        raise UnsupportedModelError(
            f"the model is wrapped in {wrapper} already: gamma would not be averaged over ranks "
            "or compiled with the rest; call hf_stable.patch first, then wrap"
        )
    if type(model).__module__.startswith("peft.") or getattr(model, "peft_config", None):
        raise UnsupportedModelError(
            "the model has PEFT adapters: their merge would edit the raw weight under sigma; "
            "train with sigma_reparam first, hf_stable.fold, then add the adapters"
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            "the model is quantised: its weights are no matrices of floating-point numbers; patch "
            "the model before it is quantised"
        )
    lookup(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device and has no values to take a spectrum of; load the "
                "weights first"
            )
        if isinstance(parameter, DTensor):
            raise UnsupportedModelError(
                f"{name} is sharded already (DTensor); call hf_stable.patch before fully_shard or "
                "accelerator.prepare"
            )


def _wrapper_of(model: nn.Module) -> str | None:
    """Name what the model is wrapped in, wherever the wrapper is held."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        return "torch.compile"
    if isinstance(model, DistributedDataParallel):
        return "DistributedDataParallel"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for candidate in gc.get_objects():
            # By type, not isinstance: proxies may answer __class__ with an error.
            if issubclass(type(candidate), DistributedDataParallel) and any(
                module is model for module in candidate.modules()
            ):
                return "DistributedDataParallel"
    return None


def _warn_if_continuing(model: nn.Module) -> None:
    folder = getattr(model, "name_or_path", "") or ""
    if os.path.isfile(os.path.join(folder, STATE_FILE)):
        warnings.warn(
            f"{folder} holds the state of a patched model ({STATE_FILE}), which this patch starts "
            "anew; to continue it, use hf_stable.load(model_class, path) instead",
            UserWarning,
            stacklevel=3,
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _nearest(given: object, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(given), list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

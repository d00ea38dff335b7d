"""How a model is made to show its attention: by functions that look on, and then call its own.

A model's parts (an encoder and a decoder, towers of two kinds) may each have an implementation of
attention of their own; each keeps it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.monitor.attention_call import AttentionCall
from hf_stable.monitor.listening import Listener, listener_of
from hf_stable.monitor.recorder import is_recomputing

__all__ = ["PREFIX", "Observed", "observing_attention"]

PREFIX = "hf_stable_probe_"
"""Attention functions are registered under this and the native implementation's name."""

_observed_functions: dict[str, Callable[..., Any]] = {}

# Whether a class's attention can be switched: transformers finds out by reading its source, and
# warns on each try where it cannot.
_switchable: WeakSet[type[nn.Module]] = WeakSet()
_fixed: WeakSet[type[nn.Module]] = WeakSet()


class Observed(NamedTuple):
    """What of a model's attention is observed.

    Attributes:
        natives: the native implementations of the parts that are.
        refused: the parts that cannot be, and why.
        parts: the part that each module belongs to.
    """

    natives: set[str]
    refused: dict[nn.Module, str]
    parts: dict[nn.Module, PreTrainedModel]

    def is_visible(self, attention: nn.Module) -> bool:
        """Say whether a module's attention may be seen."""
        return attention in self.parts and self.parts[attention] not in self.refused


@contextmanager
def observing_attention(root: nn.Module, *, is_wanted: bool = True) -> Iterator[Observed]:
    """Make the parts of a model call the observing form of their native attention in the block.

    Each module has a private copy of its config meanwhile: transformers keeps the name of the
    implementation there, and several models may share one.

    Args:
        root: a model, or a module that holds some.
        is_wanted: whether to do so. Otherwise everything stays as it is: the Trainer takes no
            other name than "sdpa" under context parallelism.
    """
    if not is_wanted:
        owners = _parts_by_module(root)
        natives = {part.config._attn_implementation for part in owners.values()}
        yield Observed({native for native in natives if native}, {}, owners)
        return
    originals = [
        (module, module.config)
        for module in root.modules()
        if isinstance(module.__dict__.get("config"), PreTrainedConfig)
    ]
    try:
        copied: dict[
            int, PreTrainedConfig
        ] = {}  # one memo for all: configs within configs stay the same
        for module, config in originals:
            module.config = _private_copy(config, copied)
        yield _switch(root)
    finally:
        for module, config in originals:
            module.config = config


def _private_copy(config: PreTrainedConfig, copied: dict[int, PreTrainedConfig]) -> Any:
    """Copy a config and those within it; what else it holds is shared, and may be anything.

    Args:
        config: of a module.
        copied: the copies so far, by id of the original: configs that are one stay one.
    """
    if id(config) not in copied:
        own = copied[id(config)] = copy.copy(config)
        for name, value in vars(config).items():
            if isinstance(value, PreTrainedConfig):
                vars(own)[name] = _private_copy(value, copied)
    return copied[id(config)]


def _switch(root: nn.Module) -> Observed:
    """Name the observing functions in the private configs of the parts that can be observed."""
    owners = _parts_by_module(root)
    configs = {id(config): config for config in map(_own_config, owners) if config is not None}
    # To switch one part is to switch those within it, so each one's choice is noted first.
    natives = {key: config._attn_implementation for key, config in configs.items()}
    refused = {}
    for part in dict.fromkeys(owners.values()):
        reason = _why_not(part, natives[id(part.config)])
        if reason is not None:
            refused[part] = reason
    fixed = {id(_own_config(module)) for module, part in owners.items() if part in refused}
    for key, config in configs.items():
        native = natives[key]
        if key in fixed or not _is_known(native):
            config._attn_implementation_internal = native
        else:
            config._attn_implementation_internal = _register(native)
    observed = [part for part in dict.fromkeys(owners.values()) if part not in refused]
    return Observed({natives[id(part.config)] for part in observed}, refused, owners)


def _parts_by_module(root: nn.Module) -> dict[nn.Module, PreTrainedModel]:
    """Return the model that each module belongs to, the innermost; modules of none are left out."""
    owners: dict[str, PreTrainedModel] = {}
    found = {}
    for name, module in root.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[name] = module
        elif name.rpartition(".")[0] in owners and name:
            owners[name] = owners[name.rpartition(".")[0]]
        if name in owners:
            found[module] = owners[name]
    return found


def _own_config(module: nn.Module) -> Any:
    config = module.__dict__.get("config")
    return config if isinstance(config, PreTrainedConfig) else None


def _is_known(native: Any) -> bool:
    return native == "eager" or native in AttentionInterface()


def _why_not(part: PreTrainedModel, native: Any) -> str | None:
    """Return why a part's attention cannot be observed, or None."""
    if native == "eager" and getattr(part.config, "reorder_and_upcast_attn", False):
        return (
            "reorder_and_upcast_attn under eager attention does not go through the attention "
            'interface; use attn_implementation="sdpa"'
        )
    if not _is_known(native):
        return f"attention implementation {native!r} cannot be observed"
    if type(part) not in _switchable | _fixed:
        name = _register(native)
        part.set_attn_implementation(name)
        is_switched = part.config._attn_implementation == name
        (_switchable if is_switched else _fixed).add(type(part))
    if type(part) in _fixed:
        return f"{type(part).__name__} does not use transformers' attention interface (eager only)"
    return None


def _register(native: str) -> str:
    """Register the observing form of an implementation; return its name."""
    name = PREFIX + native.replace("/", "_")
    AttentionInterface.register(name, _observed(native))
    # Without a mask function of its own, transformers would build no mask and ignore padding.
    AttentionMaskInterface.register(name, AttentionMaskInterface()[native])
    return name


def _observed(native: str) -> Callable[..., Any]:
    """Return the attention function that observes and then calls the native one."""
    if native in _observed_functions:
        return _observed_functions[native]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        _observe(native, module, query, key, mask, options)
        function = _eager_function(module) if native == "eager" else AttentionInterface()[native]
        return function(module, query, key, value, mask, **options)

    return _observed_functions.setdefault(native, attend)


def _eager_function(module: nn.Module) -> Callable[..., Any]:
    """Find the eager attention beside a module's class: it is not in the registry."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(
        f'no eager_attention_forward beside {type(module).__name__}; use attn_implementation="sdpa"'
    )


@torch.compiler.disable
def _observe(
    native: str, module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
) -> None:
    listener = listener_of(module)
    if listener is None or is_recomputing():
        return
    if (reason := _why_not_measured(options)) is not None:
        return listener.sightings.note_refused(listener.module, reason)
    listener.sightings.note_seen(listener.module)
    if query.shape[2] == 1 and key.shape[2] > 1:
        return None  # one step of generation
    layer = listener.recorder.name_of(listener.module)
    with listener.recorder.bearing(layer, "entropy", "entropy_normalised", "rank", "mode"):
        call = _as_call(native, listener, query, key, mask, options)
        is_first = listener.module is module or query.device == _home(listener.module)
        listener.recorder.observe_attention(call, is_first=is_first)
    return None


def _why_not_measured(options: dict[str, Any]) -> str | None:
    if options.get("s_aux") is not None:
        return "its attention has sinks: it is no softmax over keys alone"
    # torch's context_parallel puts a function of its own there, which brings the other keys.
    if F.scaled_dot_product_attention.__module__.startswith("torch.distributed."):
        return "processes share each sequence, and each has some of its queries and keys"
    return None


def _as_call(
    native: str, listener: Listener, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
) -> AttentionCall:
    is_causal = options.get("is_causal")
    if is_causal is None:
        is_causal = getattr(listener.module, "is_causal", True)
    if native == "eager" or "flex" in native:
        is_causal = False  # all in the mask
    elif mask is not None and mask.ndim == 2:
        mask = mask[:, None, None].bool()  # flash attention's padding; causality is its flag
    elif mask is not None:
        is_causal = False
    return AttentionCall(
        listener.module, query.detach(), key.detach(), mask, options.get("position_bias"),
        options.get("scaling"), bool(is_causal) and query.shape[2] > 1, options.get("softcap"),
    )  # fmt: skip


def _home(module: nn.Module) -> torch.device | None:
    """Return the device of a module, on which its first replica runs."""
    return next((parameter.device for parameter in module.parameters()), None)

"""Record what happens inside a model's attention and blocks while it runs, patched or plain.

`probe` is a context manager around a forward (and backward) that runs anyway. The model's native
attention kernel computes the output; the measures see the same queries, keys and mask.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_stable.architectures.finding import FoundBlock, find_blocks
from hf_stable.architectures.heads import count_heads
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.monitor.recorder import AttentionCall, Recorder, is_recomputing
from hf_stable.monitor.records import Records, check_maps, resolve_terms
from hf_stable.monitor.terms import names_of

__all__ = ["Records", "probe"]

PREFIX = "hf_stable_probe_"
"""Attention functions are registered under this and the native implementation's name."""

# Which recorder listens to which module. Hooks and attention functions look here when they run.
_recorders: WeakKeyDictionary[nn.Module, Recorder] = WeakKeyDictionary()


@contextmanager
def probe(
    model: nn.Module,
    *,
    queries: Literal["all"] | int = "all",
    terms: Literal["all", "default"] | Sequence[str] = "all",
    maps: Literal["all"] | Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Records]:
    """Record the forward passes, and their backward passes, that run inside the block.

    Outputs, gradients and random numbers stay as they are, bit for bit. Values of several forwards
    (gradient accumulation) are averaged, and counts of non-finite entries are summed. Recomputation
    under gradient checkpointing is not recorded again, and neither are the one-token steps of
    `generate`.

    Within the block, `model.config` is a private copy that names the probing attention function.
    So another model that shares the config is not affected. The original is back after the block,
    also after an error. A compiled model runs uncompiled within the block, and its outputs differ
    by rounding and by other dropout masks. After the block it takes up its graph again.

    Args:
        model: a transformers model, also inside DDP, FSDP2, `torch.compile` or PEFT wrappers.
        queries: rows of each attention map to measure: "all", or how many to sample (see
            `hf_stable.measures.entropy.sample_queries`).
        terms: what to record: "all", "default" (without the spectra of single weights and the
            entropy bound) or names from `hf_stable.monitor.terms`. Models of unregistered
            architectures have those that need no more than attention.
        maps: heads whose maps to keep, subsampled (`Records.maps`).
        generator: CPU generator for sampled rows; without one, the same rows each time. The
            global one is never used.

    Yields:
        `Records`, filled while the block runs. Under data parallelism each rank has its own.

    Raises:
        ValueError: for an unknown term, a bad `queries`, or a head in `maps` that no layer has.
        UnsupportedModelError: if the model's attention cannot be observed, or terms are asked for
            that its architecture is not described for.
        RuntimeError: if the model is being probed already.
    """
    inner = _pretrained(model)
    wanted = resolve_terms(terms)
    blocks = _find_blocks(inner, wanted)
    check_maps(maps, _most_heads(inner, blocks))
    if any(module in _recorders for module in inner.modules()):
        raise RuntimeError("this model is being probed already; a probe does not nest")
    recorder = Recorder(inner, blocks, wanted, queries=queries, maps=maps, generator=generator)
    handles: list[Any] = []
    originals = _with_private_configs(inner)
    try:
        native = _switch_attention(inner)
        handles += _hook(inner, recorder)
        with _uncompiled(native):
            yield recorder.records
    finally:
        for handle in handles:
            handle.remove()
        for module in inner.modules():
            _recorders.pop(module, None)
        for module, config in originals:
            module.config = config
        recorder.close()
    if recorder.ran_forward and not recorder.called_attention:
        warnings.warn(
            f"{type(inner).__name__} ran within probe(), and none of its attention was seen: it "
            "goes past transformers' attention interface",
            UserWarning,
            stacklevel=3,
        )


def _pretrained(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside whatever wraps it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnsupportedModelError(
        f"{type(model).__name__} holds no transformers model: probe() observes attention through "
        "transformers' attention interface; hf_stable.entropy measures tensors of any origin"
    )


def _find_blocks(model: PreTrainedModel, wanted: frozenset[str]) -> list[FoundBlock]:
    """Return the blocks of a model with their description, or none where none is needed."""
    try:
        return find_blocks(model)
    except UnsupportedModelError as error:
        possible = names_of(seen=("attention",))
        if wanted <= set(possible):
            return []
        raise UnsupportedModelError(
            f"{error}. Without that, pass terms={list(possible)}: these are recorded for "
            "any model that uses transformers' attention interface"
        ) from error


def _most_heads(model: PreTrainedModel, blocks: Sequence[FoundBlock]) -> int | None:
    """Return how many heads the layer with most of them has; None where nothing says so."""
    if not blocks:
        heads = getattr(model.config, "num_attention_heads", None)
        return heads if isinstance(heads, int) else None
    return max(
        count_heads(found.module, attention)
        for found in blocks
        for _, attention in found.attentions()
    )


def _with_private_configs(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """Give the modules a copy of their config; return what each had.

    transformers keeps the name of the attention implementation in the config object, which
    several models may share.
    """
    originals = []
    copied: dict[int, Any] = {}  # one memo for all: configs within configs stay the same objects
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            originals.append((module, config))
            module.config = copy.deepcopy(config, copied)
    return originals


def _switch_attention(model: PreTrainedModel) -> str:
    """Make a model call the observing form of its native attention; return the native name."""
    native = model.config._attn_implementation
    if native == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
        raise UnsupportedModelError(
            "reorder_and_upcast_attn under eager attention does not go through the attention "
            'interface; use attn_implementation="sdpa"'
        )
    if native != "eager" and native not in AttentionInterface():
        raise UnsupportedModelError(f"attention implementation {native!r} cannot be observed")
    name = PREFIX + native.replace("/", "_")
    AttentionInterface.register(name, _observed(native))
    # Without a mask function of its own, transformers would build no mask and ignore padding.
    AttentionMaskInterface.register(name, AttentionMaskInterface()[native])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not use transformers' attention interface (eager only), "
            "so its attention cannot be observed; its weights can be measured by hf_stable.spectral"
        )
    return native


def _uncompiled(native: str) -> AbstractContextManager[Any]:
    """Let compiled models run as they were written, for as long as the context is open.

    Traced with hooks, a graph would come in pieces, and torch.compile would go on to use the
    pieces after the hooks are gone. Flex attention has to be compiled to be itself.
    """
    return nullcontext() if "flex" in native else torch.compiler.set_stance("force_eager")


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


_observed_functions: dict[str, Callable[..., Any]] = {}


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
    recorder = _recorders.get(module)
    if recorder is None or is_recomputing():
        return
    recorder.called_attention = True
    if query.shape[2] == 1 and key.shape[2] > 1:
        return  # one step of generation
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} caps its logits or has attention sinks: its attention is no "
            "plain softmax of q, k and a mask"
        )
    is_causal = options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if native == "eager" or "flex" in native:
        is_causal = False  # all in the mask
    elif mask is not None and mask.ndim == 2:
        mask = mask[:, None, None].bool()  # flash attention's padding; causality is its flag
    elif mask is not None:
        is_causal = False
    recorder.observe_attention(
        AttentionCall(
            module, query.detach(), key.detach(), mask, options.get("position_bias"),
            options.get("scaling"), bool(is_causal) and query.shape[2] > 1,
        )
    )  # fmt: skip


def _hook(model: PreTrainedModel, recorder: Recorder) -> list[Any]:
    """Let the recorder hear of forwards, of tokens that enter blocks, and of attention."""
    for module in model.modules():
        _recorders[module] = recorder
    # A wrapper may call the model's `forward` past its hooks, and the model that of its base.
    handles = [m.register_forward_hook(_note_forward) for m in {model, model.base_model}]
    for module in recorder.watched_inputs():
        handles.append(module.register_forward_pre_hook(_observe_input, with_kwargs=True))
    return handles


@torch.compiler.disable
def _note_forward(module: nn.Module, args: Any, output: Any) -> None:
    if module in _recorders:
        _recorders[module].ran_forward = True


@torch.compiler.disable
def _observe_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if module in _recorders:
        _recorders[module].observe_input(module, args[0] if args else kwargs["hidden_states"])

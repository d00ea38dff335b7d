"""Maps of attention that goes past transformers' interface: asked of the attention module itself.

Such a module calls no function that could look on. But it returns its maps where it is asked for
them (`output_attentions`). So it runs once more, beside the forward that counts: under eager
attention, without dropout, gradients and caches. The forward that counts stays as it is, bit for
bit. The other one costs a forward of the attention, and the memory of whole maps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_stable.architectures.finding import FoundBlock
from hf_stable.measures.entropy import count_visible_keys
from hf_stable.monitor.listening import listener_of
from hf_stable.monitor.recorder import is_recomputing

__all__ = ["asking_for_maps", "modules_with_maps"]

_CACHES = ("past_key_values", "past_key_value", "layer_past")


def modules_with_maps(blocks: Iterable[FoundBlock]) -> list[nn.Module]:
    """Return the attention modules of blocks whose entries say that they return their maps."""
    return [
        found.module.get_submodule(attention.module)
        for found in blocks
        for _, attention in found.attentions()
        if attention.returns_maps
    ]


@contextmanager
def asking_for_maps(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Show the maps of these modules to whoever listens to them, as long as the context is open."""
    handles = [module.register_forward_hook(_ask, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.compiler.disable
def _ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    listener = listener_of(module)
    if listener is None or is_recomputing() or not listener.recorder.wants_attention:
        return
    layer = listener.recorder.name_of(listener.module)
    listener.sightings.note_seen(listener.module)
    with listener.recorder.bearing(layer, "entropy", "entropy_normalised", "rank", "mode"):
        maps = _maps_of(module, args, kwargs, listener.recorder.paused)
        if maps is not None:
            is_first = listener.module is module or maps.device == _home(listener.module)
            listener.recorder.observe_maps(listener.module, maps, is_first=is_first)


def _maps_of(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], paused: Any
) -> Tensor | None:
    """Return the maps (batch, heads, queries, keys) of a call that has just been; None for a step.

    A step of generation, or any call that continues a cache, has no map of its own.
    """
    call = inspect.signature(module.forward).bind(*args, **kwargs)
    tokens = next(value for value in call.arguments.values() if isinstance(value, Tensor))
    for name in _CACHES:
        cache = call.arguments.pop(name, None)
        # By now the call itself has been added to it.
        if cache is not None and _length(cache, module) > tokens.shape[1]:
            return None
    call.arguments["output_attentions"] = True
    if "use_cache" in call.arguments:
        call.arguments["use_cache"] = False
    _write_mask_out(module, call.arguments, tokens)
    with torch.no_grad(), paused(), _evaluating(module):
        found = module.forward(*call.args, **call.kwargs)
    maps = [each for each in found if isinstance(each, Tensor) and each.ndim == 4]
    if not maps:
        raise ValueError(f"{type(module).__name__} returns no maps (batch, heads, queries, keys)")
    return _without_blind_rows(maps[-1], call.arguments.get("attention_mask"))


def _without_blind_rows(maps: Tensor, mask: Any) -> Tensor:
    """Make rows NaN that see no key, as softmax has them of a row of -inf.

    A mask of least numbers, in place of -inf, leaves them uniform: padding on the left would look
    like attention to everything.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return maps
    rows = torch.arange(maps.shape[2], device=mask.device)
    seen = count_visible_keys(maps.shape[3], rows, mask if mask.is_floating_point() else mask > 0)
    return maps.masked_fill((seen == 0).unsqueeze(-1).to(maps.device), torch.nan)


def _write_mask_out(module: nn.Module, arguments: dict[str, Any], tokens: Tensor) -> None:
    """Make the mask of a causal call the additive one that eager attention takes.

    Under sdpa there may be none, and causality a flag of the kernel, or a boolean one.
    """
    if getattr(getattr(module, "config", None), "_attn_implementation", None) != "sdpa":
        return
    mask = arguments.get("attention_mask")
    if mask is None:
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=tokens.dtype, device=tokens.device)
        mask = zeros.masked_fill(~mask, torch.finfo(tokens.dtype).min)
    arguments["attention_mask"] = mask


def _length(cache: Any, module: Any) -> int:
    layer = getattr(module, "layer_idx", getattr(module, "layer_id", 0))
    length: int = cache.get_seq_length(layer) if hasattr(cache, "get_seq_length") else 0
    return length


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off, without what else a module does when it is told to evaluate."""
    training = [each for each in module.modules() if each.training]
    try:
        for each in training:
            each.training = False
        yield
    finally:
        for each in training:
            each.training = True


def _home(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)

"""LoRA layers of PEFT in a model: which weights belong together. Needs no PEFT itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_stable.architectures.registry import UnsupportedModelError

__all__ = ["LoraLayer", "find_lora_layers"]


@dataclass(frozen=True)
class LoraLayer:
    """A layer that computes with `base + scale * up @ down`, or the transpose of that sum's right.

    Attributes:
        name: of the layer in the model.
        down: A, (r, n).
        up: B, (m, r).
        base: the frozen weight, (m, n), or (n, m) if `transposed`.
        scale: what the product is multiplied by, lora_alpha / r or lora_alpha / sqrt(r).
        transposed: whether the layer keeps its weight as (n, m), as GPT-2's Conv1D does.
    """

    name: str
    down: nn.Parameter
    up: nn.Parameter
    base: nn.Parameter
    scale: float
    transposed: bool


def find_lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Return the LoRA layers whose factors are trained, in the model's order.

    LoRA on embeddings is left out, as embeddings are from Rule 1.

    Raises:
        UnsupportedModelError: for a layer whose merged weight is not its frozen weight plus one
            product of two trained factors.
    """
    layers = [
        _layer(name, module, adapter)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
        for adapter in _trained_adapters(name, module)
    ]
    bases = [id(layer.base) for layer in layers]
    for layer in layers:
        if bases.count(id(layer.base)) > 1:
            _refuse(layer.name, "shares its weight with another layer that has an adapter too")
    return layers


def _trained_adapters(name: str, module: Any) -> list[str]:
    trained = [
        adapter
        for adapter in module.lora_A
        if module.lora_A[adapter].weight.requires_grad
        or module.lora_B[adapter].weight.requires_grad
    ]
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if trained and active != trained:
        _refuse(name, f"trains the adapters {trained} and computes with {active}")
    if len(trained) > 1:
        _refuse(name, f"has several trained adapters, {', '.join(trained)}")
    return trained


def _layer(name: str, module: Any, adapter: str) -> LoraLayer:
    base = module.get_base_layer()
    if not isinstance(base, nn.Linear | Conv1D | nn.Conv2d):
        _refuse(name, f"stands on a {type(base).__name__}, which keeps no matrix as its weight")
    if adapter in getattr(module, "lora_variant", {}):
        kind = type(module.lora_variant[adapter]).__name__
        _refuse(name, f"is no plain LoRA ({kind}): its weight is more than a sum")
    down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    if not (down.requires_grad and up.requires_grad):
        _refuse(name, "has one of its factors frozen")
    if base.weight.requires_grad:
        _refuse(name, "trains the weight under the adapter too")
    transposed = isinstance(base, Conv1D)
    return LoraLayer(name, down, up, base.weight, float(module.scaling[adapter]), transposed)


def _refuse(name: str, problem: str) -> None:
    raise UnsupportedModelError(
        f"AdamW2 cannot bound the merged weight of {name!r}: it {problem}. Bound the factors apart "
        "instead (lora='factors', the default)"
    )

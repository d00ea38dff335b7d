"""How a model's parameters are grouped for AdamW2: what is exempt from the rule, what is fused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from hf_stable._ranks import whole_shape
from hf_stable.adamw2.lora_layers import LoraLayer, find_lora_layers
from hf_stable.adamw2.options import parts_options
from hf_stable.architectures.finding import find_layers, find_regions
from hf_stable.architectures.registry import UnsupportedModelError, require_model

__all__ = ["lora_groups", "parameter_groups", "parameter_rules", "part_groups"]

_FREE_FACTORS = {"lora_B", "lora_embedding_A", "lora_embedding_B"}


def parameter_groups(model: nn.Module, *, weight_decay: float = 1e-2) -> list[dict[str, Any]]:
    """Return groups of all that a model trains, for a loop without the Trainer.

    `AdamW2(parameter_groups(model), lr=..., tau=...)` treats them as `optim="adamw2"` does:
    embeddings, biases and LoRA's B are exempt from Rule 1, each part of a fused projection has a
    rate of its own, and `effective_lr` names them.

    Args:
        model: any; fused projections are known of registered architectures.
        weight_decay: decay of matrices, embeddings and convolution kernels. Biases, norm gains,
            gamma and other vectors get none.
    """
    require_model(model, "parameter_groups")
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            is_matrix = len(whole_shape(param)) > 1
            (decayed if is_matrix and not _is_bias(name) else rest).append(param)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return part_groups(groups, model, merged=False)


def lora_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups of all that a model trains, in which Rule 1 bounds LoRA's merged weights.

    `AdamW2(lora_groups(model), lr=..., tau=...)` gives A and B of a layer one rate, at which a step
    changes the merged weight `W = W0 + s B A` by at most `tau` times its largest singular value
    (without weight decay, which shrinks both factors):

        s * |B' A' - B A| <= tau * |W|

    Fused projections are taken whole. What is not LoRA on a Linear, a Conv1D or a Conv2d has the
    groups that `optim="adamw2"` gives it. The frozen W0 is a member of its group, so that it goes
    where the optimizer goes (copies, files, devices); it is neither stepped nor saved.

    Args:
        model: with LoRA adapters of PEFT, one trained adapter a layer.

    Raises:
        ValueError: if nothing in the model trains by LoRA.
        UnsupportedModelError: for DoRA and other variants, several adapters on a layer, a factor
            that is frozen, or a weight below that is not.
    """
    require_model(model, "lora_groups")
    trained = [param for param in model.parameters() if param.requires_grad]
    return part_groups([{"params": trained}], model, merged=True)


def parameter_rules(model: nn.Module) -> dict[int, dict[str, Any]]:
    """Return the group options of AdamW2 that a model asks for, by id of the parameter.

    `tau=inf` for the weight of every `nn.Embedding`, and so for a head tied to it; for what has
    "bias" in its own name (biases of layers, beta of norms, Swin's tables of relative position
    biases) and LoRA's B, which start at zero, so that their size is no scale for their step, now
    or later; and for LoRA on embeddings. Embeddings that are bare parameters (ViT's `cls_token`
    and `position_embeddings`) are under the rule, by their l2 norm.

    Fused projections that the model's architecture names get `parts` (with `blocks` and
    `block_dim`, the same in two numbers), as plain data: any optimizer may take the groups and put
    them into its state, which is read without a class. Of an unregistered architecture, matrices
    are taken whole.
    """
    rules: dict[int, dict[str, Any]] = {
        id(param): {"tau": math.inf}
        for name, param in model.named_parameters()
        if _is_bias(name) or not _FREE_FACTORS.isdisjoint(name.split("."))
    }
    rules |= {
        id(module.weight): {"tau": math.inf}
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    }
    try:
        find_regions(model)
    except UnsupportedModelError:
        return rules
    try:
        layers = find_layers(model)
    except UnsupportedModelError as error:
        warnings.warn(
            f"AdamW2 takes the fused projections of this {type(model).__name__} whole, with one "
            f"rate for all their parts, since the entry of its architecture does not fit: {error}",
            UserWarning,
            stacklevel=2,
        )
        return rules
    for layer in layers:
        if not layer.parts.is_whole and layer.weight is not None:
            rules.setdefault(id(layer.weight), parts_options({"parts": layer.parts}))
    return rules


def part_groups(
    groups: Iterable[dict[str, Any]], model: nn.Module, *, merged: bool
) -> list[dict[str, Any]]:
    """Part groups further by what the model's structure asks for.

    Args:
        groups: as any optimizer takes them, their parameters those of the model.
        model: whose structure counts.
        merged: whether LoRA's factors are bounded by the weight that they change.

    Returns:
        New groups, in the order of the given ones, with (name, parameter) pairs.

    Raises:
        ValueError, UnsupportedModelError: as `lora_groups` does.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    layers = find_lora_layers(model) if merged else []
    if merged and not layers:
        raise ValueError(
            "there is no merged weight to bound: no layer of the model has a LoRA adapter that is "
            "trained. Add one (peft.get_peft_model), or leave lora='merged' out"
        )
    factors = {id(factor): layer for layer in layers for factor in (layer.down, layer.up)}
    rules = parameter_rules(model)
    return [part for group in groups for part in _parts(group, names, rules, factors)]


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


def _parts(
    group: dict[str, Any],
    names: dict[int, str],
    rules: dict[int, dict[str, Any]],
    factors: dict[int, LoraLayer],
) -> Iterator[dict[str, Any]]:
    parts: dict[tuple[Any, ...], list[Any]] = {}
    present = {id(param) for param in group["params"]}
    for param in group["params"]:
        rule, members = rules.get(id(param), {}), [param]
        if layer := factors.get(id(param)):
            if not {id(layer.down), id(layer.up)} <= present:
                raise ValueError(
                    f"A and B of {layer.name!r} are in different groups, and a bound on their "
                    "merged weight gives them one rate: put them into one group"
                )
            rule = {"lora_scale": layer.scale, "lora_transposed": layer.transposed}
            members = [layer.down, layer.up, layer.base] if param is layer.down else []
        parts.setdefault(tuple(rule.items()), []).extend((names[id(p)], p) for p in members)
    for options, named in parts.items():
        yield {**group, "params": named, **dict(options)}

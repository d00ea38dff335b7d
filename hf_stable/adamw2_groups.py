"""AdamW2 over a model: which of its parameters are exempt from the rule, and which are fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_stable.adamw2 import AdamW2
from hf_stable.architectures.registry import UnsupportedModelError, find_layers, lookup
from hf_stable.lora_layers import LoraLayer, find_lora_layers
from hf_stable.method_config import nearest

__all__ = [
    "ModelAdamW2",
    "lora_groups",
    "parameter_rules",
    "parse_options",
    "refuse_deepspeed",
]

_OPTIONS: dict[str, Callable[[str], Any]] = {"tau": float, "power_iterations": int, "lora": str}
_LORA = ("factors", "merged")
_TRAINER_FIELDS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}


class ModelAdamW2(AdamW2):
    """AdamW2 over given groups, each parted further by what the model's structure asks for.

    Token and position embeddings, and heads tied to them, are exempt from the rule; each part of
    a fused projection of a registered architecture has a rate of its own. Everything else that
    the groups say stays: weight decay, the order, and which parameters are stepped together.

    Args:
        params: groups, as dicts.
        structure: the model whose parameters they are.
        lora: `"factors"` bounds LoRA's A and B each by its own norm, `"merged"` both by the weight
            that they change; see `lora_groups`.
        **options: for AdamW2.

    Raises:
        ValueError: for another `lora`, or `"merged"` where nothing trains by LoRA.
        UnsupportedModelError: as `lora_groups` does.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        structure: nn.Module,
        lora: str = "factors",
        **options: Any,
    ) -> None:
        """Part the groups and create the optimizer."""
        if lora not in _LORA:
            raise ValueError(
                f"lora={lora!r} is not allowed{nearest(lora, _LORA)}; choose one of "
                f"{', '.join(map(repr, _LORA))}"
            )
        super().__init__(_part(params, structure, merged=lora == "merged"), **options)


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
    trained = [param for param in model.parameters() if param.requires_grad]
    return _part([{"params": trained}], model, merged=True)


def parameter_rules(model: nn.Module) -> dict[int, dict[str, Any]]:
    """Return the group options of AdamW2 that a model asks for, by id of the parameter.

    Embeddings (any `nn.Embedding`) get `tau=inf`. Fused projections that the model's architecture
    names get `blocks` and `block_dim`; of an unregistered architecture, matrices are taken whole.
    """
    rules: dict[int, dict[str, Any]] = {
        id(module.weight): {"tau": math.inf}
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    }
    try:
        layers = find_layers(model, lookup(model))
    except UnsupportedModelError:
        return rules
    for layer in layers:
        if layer.num_parts > 1:
            block_dim = 1 if isinstance(layer.module, Conv1D) else 0
            blocks = {"blocks": layer.num_parts, "block_dim": block_dim}
            rules.setdefault(id(layer.module.weight), blocks)
    return rules


def parse_options(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return options of AdamW2 from text, as `TrainingArguments.optim_args` has them.

    Raises:
        ValueError: for a key that is not among them, with the nearest that is or the
            TrainingArguments field to set instead; or for a value that is no number.
    """
    return {key: _parse(key, text) for key, text in texts.items()}


def refuse_deepspeed(args: Any) -> None:
    """Raise ValueError where TrainingArguments ask for DeepSpeed, whose parameters are flat."""
    if getattr(args, "deepspeed_plugin", None) is not None:
        raise ValueError(
            'optim="adamw2" does not work with DeepSpeed ZeRO: it flattens the parameters, so '
            "there are no matrices to take a spectral norm of. Use FSDP2 or DDP"
        )


def _parse(key: str, text: str) -> Any:
    if key not in _OPTIONS:
        field = _TRAINER_FIELDS.get(key)
        hint = f" (set TrainingArguments.{field})" if field else nearest(key, _OPTIONS)
        raise ValueError(
            f"optim_args has {key!r}, which adamw2 does not take{hint}; it takes "
            f"{' and '.join(_OPTIONS)}"
        )
    try:
        return _OPTIONS[key](text)
    except ValueError as error:
        raise ValueError(
            f"optim_args has {key}={text!r}, which is no {_OPTIONS[key].__name__}"
        ) from error


def _part(
    groups: Iterable[dict[str, Any]], model: nn.Module, *, merged: bool
) -> list[dict[str, Any]]:
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

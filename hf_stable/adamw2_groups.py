"""AdamW2 over a model: which of its parameters are exempt from the rule, and which are fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_stable.adamw2 import AdamW2
from hf_stable.architectures.registry import UnsupportedModelError, find_layers, lookup
from hf_stable.method_config import nearest

__all__ = ["ModelAdamW2", "parameter_rules", "parse_options", "refuse_deepspeed"]

_OPTIONS: dict[str, Callable[[str], Any]] = {"tau": float, "power_iterations": int}
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
        **options: for AdamW2.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, structure: nn.Module, **options: Any
    ) -> None:
        """Part the groups and create the optimizer."""
        names = {id(param): name for name, param in structure.named_parameters()}
        rules = parameter_rules(structure)
        super().__init__(
            [part for group in params for part in _parts(group, names, rules)], **options
        )


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


def _parts(
    group: dict[str, Any], names: dict[int, str], rules: dict[int, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    parts: dict[tuple[Any, ...], list[Any]] = {}
    for param in group["params"]:
        rule = tuple(rules.get(id(param), {}).items())
        parts.setdefault(rule, []).append((names[id(param)], param))
    for rule, members in parts.items():
        yield {**group, "params": members, **dict(rule)}

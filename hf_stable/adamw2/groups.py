"""AdamW2 over a model: which of its parameters are exempt from the rule, and which are fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from hf_stable._wording import nearest
from hf_stable.adamw2.lora_layers import LoraLayer, find_lora_layers
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.architectures.finding import find_layers
from hf_stable.architectures.registry import UnsupportedModelError

__all__ = [
    "ModelAdamW2",
    "lora_groups",
    "parameter_groups",
    "parameter_rules",
    "parse_options",
    "part_schedule",
    "refuse_deepspeed",
]

_OPTIONS: dict[str, Callable[[str], Any]] = {"tau": float, "power_iterations": int, "lora": str}
_LORA = ("factors", "merged")
_FREE_FACTORS = {"lora_B", "lora_embedding_A", "lora_embedding_B"}
_TRAINER_FIELDS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}


class ModelAdamW2(AdamW2):
    """AdamW2 over given groups, each parted further by what the model's structure asks for.

    Embeddings, biases and LoRA's B are exempt from the rule, and each part of a fused projection
    has a rate of its own; `parameter_rules` says which parameters these are. Everything else that
    the groups say stays: weight decay, the order, and which parameters are stepped together. A
    state of torch's AdamW over the groups as they were given can be loaded.

    Args:
        params: groups, as dicts.
        structure: the model whose parameters they are.
        lora: `"factors"` bounds LoRA's A by its own norm, `"merged"` A and B by the weight that
            they change; see `lora_groups`.
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
        given = [{**group, "params": list(group["params"])} for group in params]
        super().__init__(_part(given, structure, merged=lora == "merged"), **options)
        places = {
            id(param): (index, place)
            for index, group in enumerate(given)
            for place, param in enumerate(group["params"])
        }
        self._given = _Given(
            [len(group["params"]) for group in given],
            [[places.get(id(param)) for param in group["params"]] for group in self.param_groups],
        )

    def per_group(self, values: Sequence[Any]) -> list[Any]:
        """Return one value for each group of this optimizer.

        Args:
            values: one for each group, or one for each that was given.

        Raises:
            ValueError: if they are neither.
        """
        if len(values) == len(self.param_groups):
            return list(values)
        if len(values) != len(self._given.sizes):
            raise ValueError(
                f"{len(values)} values are neither one for each of the {len(self._given.sizes)} "
                f"given groups nor one for each of the {len(self.param_groups)} made of them"
            )
        return [values[index] for index in self._given.indices()]

    def _as_parted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = state_dict.get("param_groups", ())
        if any("tau" in group for group in groups):
            return state_dict
        if [len(group["params"]) for group in groups] != self._given.sizes:
            return state_dict
        # Names would be those of the whole group. A frozen weight under LoRA has no label.
        parted = [
            {key: value for key, value in groups[index].items() if key != "param_names"}
            | {"params": [None if at is None else groups[at[0]]["params"][at[1]] for at in places]}
            for index, places in zip(self._given.indices(), self._given.places, strict=True)
        ]
        return {**state_dict, "param_groups": parted}

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickles and copies keep."""
        return {**super().__getstate__(), "_given": self._given}


class _Given(NamedTuple):
    """How the groups of an optimizer come from those that it was given.

    Attributes:
        sizes: number of parameters in each given group.
        places: for each group, for each of its parameters: index of the given group and place in
            it; None for a frozen weight under LoRA, which no given group has.
    """

    sizes: list[int]
    places: list[list[tuple[int, int] | None]]

    def indices(self) -> list[int]:
        """Return the index of the given group that each group is a part of."""
        return [next(at[0] for at in group if at is not None) for group in self.places]


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
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (decayed if param.ndim > 1 and not _is_bias(name) else rest).append(param)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return _part(groups, model, merged=False)


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

    `tau=inf` for the weight of every `nn.Embedding`, and so for a head tied to it; for what has
    "bias" in its own name (biases of layers, beta of norms, Swin's tables of relative position
    biases) and LoRA's B, which start at zero, so that their size is no scale for their step, now
    or later; and for LoRA on embeddings. Embeddings that are bare parameters (ViT's `cls_token`
    and `position_embeddings`) are under the rule, by their l2 norm.

    Fused projections that the model's architecture names get `blocks` and `block_dim`; of an
    unregistered architecture, matrices are taken whole.
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
        layers = find_layers(model)
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


def part_schedule(scheduler: Any, optimizer: Optimizer) -> None:
    """Give a schedule that was loaded a rate for each group of a ModelAdamW2.

    A schedule saved with torch's AdamW has one for each group that the Trainer made, which
    ModelAdamW2 has parted further.

    Args:
        scheduler: of the optimizer, with its state loaded.
        optimizer: any; nothing is done for others.
    """
    if not isinstance(optimizer, ModelAdamW2):
        return
    for name in ("base_lrs", "min_lrs", "_init_lrs", "_last_lr"):
        values = getattr(scheduler, name, None)
        if isinstance(values, list):
            setattr(scheduler, name, optimizer.per_group(values))


def refuse_deepspeed(args: Any) -> None:
    """Raise ValueError where TrainingArguments ask for DeepSpeed, whose parameters are flat."""
    if getattr(args, "deepspeed_plugin", None) is not None:
        raise ValueError(
            'optim="adamw2" does not work with DeepSpeed ZeRO: it flattens the parameters, so '
            "there are no matrices to take a spectral norm of. Use FSDP2 or DDP"
        )


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


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

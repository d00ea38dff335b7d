"""States that AdamW2 loads, its own and those of torch's AdamW: checked whole, then restored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_stable.adamw2.options import as_numbers, check_group
from hf_stable.adamw2.weights import LORA_STATE, MOMENTS, RULE_STATE
from hf_stable.measures.matrices import shapes_of, spectral_dtype
from hf_stable.measures.parts import Parts

__all__ = ["Entries", "prepare_loaded", "restore_state", "rule_entry"]

Entries = list[tuple[Tensor, dict[str, Any]]]
"""Parameters, and what a loaded state has for each."""

_ADAMW_ONLY_OPTIONS = ("amsgrad", "foreach", "fused", "differentiable", "decoupled_weight_decay")
_NEEDED_OPTIONS = ("lr", "betas", "eps", "weight_decay")
_NEEDED_STATE = ("step", *MOMENTS)
_LOADABLE = "only states of AdamW2 and of torch's AdamW can be loaded"


def prepare_loaded(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], options: Sequence[str]
) -> tuple[dict[str, Any], Entries]:
    """Check a state, and return it as `torch.optim.Optimizer.load_state_dict` can take it.

    What Rule 1 keeps is left out of the result: torch would cast it to the dtype of the weight.

    Args:
        state_dict: the loaded state. Nothing in it is changed.
        groups: of the optimizer that loads it.
        options: names of AdamW2's options, which stay as they are where the state has none.

    Returns:
        The state for torch; and what was saved for each parameter, for `restore_state`, without
        what another form of Rule 1 kept there (LoRA's factors apart, or merged).

    Raises:
        ValueError: for a state that AdamW2 cannot continue, saying why.
    """
    for key in ("param_groups", "state"):
        if key not in state_dict:
            raise ValueError(f"the loaded state has no {key!r}, so it is no optimizer's")
    saved_groups, saved = state_dict["param_groups"], state_dict["state"]
    if [len(group["params"]) for group in saved_groups] != [len(g["params"]) for g in groups]:
        return state_dict, []  # torch says what is wrong
    merged = [
        _merge_options(index, group, own, options)
        for index, (group, own) in enumerate(zip(saved_groups, groups, strict=True))
    ]
    entries = [
        (param, saved[label], shapes)
        for saved_group, own, group in zip(saved_groups, groups, merged, strict=True)
        for label, param, shapes in zip(
            saved_group["params"], own["params"], _rule_shapes(own["params"], group), strict=True
        )
        if saved.get(label)
    ]
    for param, entry, shapes in entries:
        _check_entry(entry, param, shapes)
    complete = [
        (param, entry if _has_rule_state(entry, shapes) else _without_rule(entry))
        for param, entry, shapes in entries
    ]
    for_torch = {
        label: _without_rule(entry) if isinstance(entry, dict) else entry
        for label, entry in saved.items()
    }
    return {**state_dict, "param_groups": merged, "state": for_torch}, complete


def restore_state(state: dict[str, Any], entry: dict[str, Any], param: Tensor) -> None:
    """Finish the state of a parameter, of which torch has cast the moments to its dtype."""
    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(param.device)
    for key in MOMENTS:
        if state[key].stride() != param.stride():
            state[key] = torch.empty_like(param).copy_(state[key])
    for key in RULE_STATE:
        if key in entry:
            state[key] = rule_entry(key, entry[key], param)


def rule_entry(key: str, value: Tensor, param: Tensor) -> Tensor:
    """Return a copy of what Rule 1 keeps under a key, as it belongs beside a parameter."""
    dtype = torch.bool if key == "exempt" else spectral_dtype(param.dtype)
    return value.to(device=param.device, dtype=dtype, copy=True)


def _merge_options(
    index: int, saved: dict[str, Any], own: dict[str, Any], options: Sequence[str]
) -> dict[str, Any]:
    """Return the options of a loaded group, checked against the parameters that it will have."""
    where = f"group {index} of the loaded state"
    missing = [name for name in _NEEDED_OPTIONS if name not in saved]
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(missing)}: {_LOADABLE}")
    if saved.get("amsgrad"):
        raise ValueError(
            f"{where} is of an AdamW with amsgrad=True: AdamW2 keeps no maximum of the second "
            "moments"
        )
    if saved.get("decoupled_weight_decay") is False and saved["weight_decay"]:
        raise ValueError(
            f"{where} has weight_decay={saved['weight_decay']!r} that is part of the gradient "
            f"(Adam, RAdam, NAdam), and that of AdamW2 is decoupled: {_LOADABLE}"
        )
    merged = {name: own[name] for name in options if name in own}
    merged |= {name: value for name, value in saved.items() if name not in _ADAMW_ONLY_OPTIONS}
    try:
        merged["betas"] = as_numbers(merged["betas"])
        check_group(own["params"], merged)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return merged


def _rule_shapes(
    params: Sequence[Tensor], group: dict[str, Any]
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the shapes of what Rule 1 keeps with each parameter of a group."""
    if group["lora_scale"] is not None:
        rate: dict[str, tuple[int, ...]] = {"effective_lr": (1,)}
        for down in params[::3]:
            width = math.prod(down.shape[1:])
            yield rate
            yield rate | {key: (width,) for key in LORA_STATE} | {"exempt": (1,)}
            yield {}
        return
    for param in params:
        shapes = shapes_of(param.shape, Parts.of(group["parts"]))
        vectors = (len(shapes), max(width for _, width in shapes))
        yield {
            "weight_v": vectors,
            "update_v": vectors,
            "exempt": vectors[:1],
            "effective_lr": vectors[:1],
        }


def _has_rule_state(entry: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> bool:
    return entry.keys() & set(RULE_STATE) == shapes.keys()


def _without_rule(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in RULE_STATE}


def _check_entry(
    entry: dict[str, Any], param: Tensor, rule_shapes: dict[str, tuple[int, ...]]
) -> None:
    unknown = sorted(entry.keys() - {*_NEEDED_STATE, *RULE_STATE})
    missing = [key for key in _NEEDED_STATE if key not in entry]
    if unknown or missing:
        problem = f"has {unknown[0]!r}" if unknown else f"has no {missing[0]!r}"
        raise ValueError(
            f"the loaded state {problem} for its parameter {tuple(param.shape)}: {_LOADABLE}"
        )
    shapes = dict.fromkeys(MOMENTS, tuple(param.shape))
    if _has_rule_state(entry, rule_shapes):
        shapes |= rule_shapes
    for key, expected in shapes.items():
        if tuple(entry[key].shape) != expected:
            raise ValueError(
                f"the loaded {key} has shape {tuple(entry[key].shape)}, and its parameter "
                f"{tuple(param.shape)} needs {expected}: the state belongs to another model or "
                "another order of parameters"
            )

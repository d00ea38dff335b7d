"""Which options and parameters a group of AdamW2 can have, and options that come as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from hf_stable._ranks import whole_shape
from hf_stable._wording import nearest
from hf_stable.adamw2.merged_rule import check_factors
from hf_stable.adamw2.planning import AUTO
from hf_stable.adamw2.replaced_weights import refuse_flattened
from hf_stable.measures.parts import WHOLE, Parts

__all__ = [
    "GROUP_DEFAULTS",
    "as_numbers",
    "check_group",
    "check_options",
    "parse_options",
    "parts_options",
]

GROUP_DEFAULTS: dict[str, Any] = {
    "parts": WHOLE.to_plain(),
    "blocks": 1,
    "block_dim": 0,
    "lora_scale": None,
    "lora_transposed": False,
}
"""Options that a group alone sets, and what they are where it does not."""

_PARSERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "tau": (f"float, and not {AUTO!r}", lambda text: text if text == AUTO else float(text)),
    "power_iterations": ("int", int),
    "lora": ("str", str),
}
"""What a text has to be, and how it is read."""

_TRAINER_FIELDS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_rate(value: Any) -> bool:
    return (isinstance(value, Tensor) or _is_number(value)) and bool(0 <= value < math.inf)


def _is_beta(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _are_betas(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_is_beta, value))


def _is_finite(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _are_parts(value: Any) -> bool:
    try:
        return bool(Parts.of(value))
    except ValueError:
        return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 1


_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a finite number >= 0, or a tensor of one", _is_rate),
    "betas": ("two numbers in [0, 1)", _are_betas),
    "eps": ("a finite number >= 0", _is_finite),
    "weight_decay": ("a finite number >= 0", _is_finite),
    "tau": (
        "a number > 0; inf switches Rule 1 off, 'auto' derives it from total_steps",
        lambda tau: _is_number(tau) and tau > 0,
    ),
    "power_iterations": ("an integer >= 1", _is_count),
    "parts": ("an hf_stable.spectral.Parts", _are_parts),
    "lora_scale": (
        "None or a finite number > 0",
        lambda scale: scale is None or (_is_finite(scale) and scale > 0),
    ),
    "lora_transposed": ("True or False", lambda transposed: transposed in (True, False)),
}


_TORCH_WORDING = {
    "lr": "Invalid learning rate: {}",
    "eps": "Invalid epsilon value: {}",
    "weight_decay": "Invalid weight_decay value: {}",
}


def check_options(options: dict[str, Any]) -> None:
    """Raise, naming the option, for one that no group can have.

    Errors that torch's AdamW has too begin with its words.

    Args:
        options: a value for every option.

    Raises:
        ValueError: for an option out of range, and for `amsgrad` and `differentiable`.
        RuntimeError: for `fused` and `foreach` together, as torch does.
    """
    _check_implementation(options)
    for name, (allowed, holds) in _ALLOWED.items():
        value = options[name]
        if not holds(value):
            wording = _TORCH_WORDING.get(name, f"AdamW2 cannot use {name}={{!r}}").format(value)
            if name == "betas" and isinstance(value, Sequence) and len(value) == 2:
                index = next(i for i, beta in enumerate(value) if not _is_beta(beta))
                wording = f"Invalid beta parameter at index {index}: {value[index]}"
            raise ValueError(f"{wording}: give {allowed}")


def as_numbers(betas: Any) -> Any:
    """Return betas as numbers where both are tensors of one element, else as they are.

    Raises:
        ValueError: if one is a tensor and the other is none, or a tensor has several elements.
    """
    if not isinstance(betas, Sequence) or not any(isinstance(beta, Tensor) for beta in betas):
        return betas
    for index, beta in enumerate(betas):
        if not isinstance(beta, Tensor):
            raise ValueError(f"betas must be either both floats or both Tensors, got {betas}")
        if beta.numel() != 1:
            raise ValueError(f"Tensor betas[{index}] must be 1-element, got {tuple(beta.shape)}")
    return tuple(beta.item() for beta in betas)


def _check_implementation(options: dict[str, Any]) -> None:
    """Check what torch's AdamW has beside the arithmetic: how it is computed."""
    if options["amsgrad"]:
        raise ValueError(
            "AdamW2 has no amsgrad=True: it keeps no maximum of the second moments. Leave it out"
        )
    if options["differentiable"]:
        raise ValueError(
            "AdamW2 has no differentiable=True: its step runs in fused kernels, which have no "
            "derivative. Leave it out"
        )
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    lr = options["lr"]
    if isinstance(lr, Tensor):
        if options["foreach"] and not options["capturable"]:
            raise ValueError(
                "lr as a Tensor is not supported for capturable=False and foreach=True: leave "
                "foreach out, AdamW2 chooses its kernels itself"
            )
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")


def parts_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group that say where the matrices of its weights lie, all of them.

    `parts` says it in full; `blocks` and `block_dim` say it of equal blocks along one dimension.
    Either is made from the other: plain data, for files that are read without a class.

    Args:
        group: with one of the two, with both, or with neither.

    Returns:
        `parts`, `blocks` and `block_dim`; nothing for a group with neither.

    Raises:
        ValueError: for `blocks` or `block_dim` that say nothing, or something else than `parts`.
    """
    if "parts" in group and not _are_parts(group["parts"]):
        return {}  # `check_options` says so
    parts = Parts.of(group["parts"]) if "parts" in group else None
    if "blocks" in group or "block_dim" in group:
        blocks, dim = group.get("blocks", 1), group.get("block_dim", 0)
        if not _is_count(blocks) or dim not in (0, 1):
            raise ValueError(
                f"AdamW2 cannot use blocks={blocks!r} along block_dim={dim!r}: give an integer "
                ">= 1, and 0 or 1"
            )
        equal = Parts((1,) * blocks, dim=dim)
        if parts is not None and (len(parts.shares), parts.dim) != (blocks, equal.dim):
            raise ValueError(
                f"blocks={blocks} along block_dim={dim} say something else than {parts}: leave "
                "them out"
            )
        parts = parts or equal
    if parts is None:
        return {}
    return {"parts": parts.to_plain(), "blocks": len(parts.shares), "block_dim": parts.dim}


def check_group(params: Sequence[Any], options: dict[str, Any]) -> None:
    """Raise for options out of range, and for parameters that cannot be stepped with them.

    Args:
        params: of the group; what is no tensor is left to torch's own message.
        options: a value for every option.

    Raises:
        ValueError: for an option out of range, parameters that another library has flattened, or
            `parts` or `lora_scale` that do not fit the parameters.
        TypeError: for parameters that are not real floating-point tensors.
    """
    check_options(options)
    tensors = [param for param in params if isinstance(param, Tensor)]
    for param in tensors:
        _check_param(param, options)
    if options["lora_scale"] is not None and len(tensors) == len(params):
        check_factors(params, options)


def _check_param(param: Tensor, options: dict[str, Any]) -> None:
    if not param.is_floating_point():
        raise TypeError(
            f"AdamW2 cannot optimize a {param.dtype} parameter of shape {tuple(param.shape)}: "
            "give real floating-point parameters"
        )
    refuse_flattened(param)
    parts, shape = Parts.of(options["parts"]), whole_shape(param)
    if parts.is_whole:
        return
    try:
        if len(shape) != 2 + parts.stacked:
            raise ValueError("it has other dimensions")
        parts.check(shape)
    except ValueError as error:
        raise ValueError(
            f"{parts} does not fit a parameter of shape {tuple(shape)}: {error}. Give such "
            "weights a group of their own"
        ) from error


def parse_options(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return options of AdamW2 from text, as `TrainingArguments.optim_args` has them.

    Raises:
        ValueError: for a key that is not among them, with the nearest that is or the
            TrainingArguments field to set instead; or for a value that is no number.
    """
    return {key: _parse(key, text) for key, text in texts.items()}


def _parse(key: str, text: str) -> Any:
    if key not in _PARSERS:
        field = _TRAINER_FIELDS.get(key)
        hint = f" (set TrainingArguments.{field})" if field else nearest(key, _PARSERS)
        raise ValueError(
            f"optim_args has {key!r}, which adamw2 does not take{hint}; it takes "
            f"{' and '.join(_PARSERS)}"
        )
    kind, read = _PARSERS[key]
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"optim_args has {key}={text!r}, which is no {kind}") from error

"""What StabilityCallback's options may be; each is checked before training begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args

from torch import nn
from transformers import TrainingArguments

from hf_stable.measures.entropy import sample_queries
from hf_stable.monitor.readings import check_sharpness_can_be_measured
from hf_stable.monitor.records import check_maps, resolve_terms
from hf_stable.monitor.rollbacks import check_can_roll_back, check_can_skip
from hf_stable.monitor.thresholds import Thresholds

__all__ = ["ACTIONS", "Console", "action_name", "as_thresholds", "check_options", "check_training"]

ACTIONS = ("warn", "stop", "checkpoint", "rollback")

Console = Literal["short", "full", "off"]
"""How much of a record is printed: one short part, all keys, or none of the monitor's."""

_FUNCTION = "function "


def check_options(
    *,
    every: Any,
    queries: Any,
    terms: Any,
    maps: Any,
    sharpness_every: Any,
    on_collapse: Any,
    max_rollbacks: Any,
    rollback_lr_factor: Any,
    console: Any,
    keep_batches: Any,
    skip_batches: Any,
) -> None:
    """Raise ValueError for an option out of range, saying what is allowed."""
    _check_count("every", every, 1, "steps")
    if sharpness_every is not None:
        _check_count("sharpness_every", sharpness_every, 1, "steps")
    _check_count("max_rollbacks", max_rollbacks, 0, "rollbacks")
    sample_queries(1, queries)
    resolve_terms(terms)
    check_maps("all" if maps is True else () if maps is False else maps)
    if isinstance(on_collapse, str) and on_collapse.startswith(_FUNCTION):
        raise ValueError(
            f"on_collapse was the {on_collapse}, which a checkpoint does not hold: leave "
            "restore_callback_states_from_checkpoint out (progress is taken up without it)"
        )
    if not callable(on_collapse) and on_collapse not in ACTIONS:
        raise ValueError(
            f"on_collapse is one of {', '.join(ACTIONS)} or a function, got {on_collapse!r}"
        )
    _check_batches(keep_batches, skip_batches, on_collapse)
    is_number = isinstance(rollback_lr_factor, int | float)
    is_kept = skip_batches and rollback_lr_factor == 1  # the rate was not to blame
    if not is_number or not (0 < rollback_lr_factor < 1 or is_kept):
        raise ValueError(
            "rollback_lr_factor lies between 0 and 1 (with skip_batches=True it may be 1), got "
            f"{rollback_lr_factor!r}"
        )
    if console not in get_args(Console):
        raise ValueError(f"console is one of {', '.join(get_args(Console))}, got {console!r}")


def check_training(
    args: TrainingArguments,
    model: nn.Module,
    saved: Any,
    *,
    on_collapse: Any,
    sharpness_every: Any,
    skip_batches: bool,
) -> None:
    """Raise ValueError for what these options cannot do in this training.

    Args:
        args: of the Trainer.
        model: that it trains.
        saved: the callback's entry in the Trainer's state.
        on_collapse: option of the callback.
        sharpness_every: option of the callback.
        skip_batches: option of the callback.
    """
    if isinstance(saved, list):
        raise ValueError("this Trainer has two StabilityCallbacks: remove one of them")
    if callable(on_collapse) and args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "a checkpoint cannot hold on_collapse as a function: leave "
            "restore_callback_states_from_checkpoint out (progress is taken up without it)"
        )
    if on_collapse == "rollback":
        check_can_roll_back(args)
    if skip_batches:
        check_can_skip(args)
    if sharpness_every:
        check_sharpness_can_be_measured(args, model)


def as_thresholds(thresholds: Any) -> Thresholds | None:
    """Return thresholds given as such, or by name as `trainer_state.json` keeps them.

    Raises:
        ValueError: for anything else, or a name that is not among them.
    """
    if thresholds is None or isinstance(thresholds, Thresholds):
        return thresholds
    known = [field.name for field in fields(Thresholds)]
    if not isinstance(thresholds, Mapping) or not set(thresholds) <= set(known):
        raise ValueError(
            "thresholds is a hf_stable.monitor.alarms.Thresholds, or a mapping with names among "
            f"{', '.join(known)}; got {thresholds!r}"
        )
    return Thresholds(**thresholds)


def action_name(on_collapse: Any) -> str:
    """Return what stands for an action in JSON."""
    if isinstance(on_collapse, str):
        return on_collapse
    return _FUNCTION + getattr(on_collapse, "__qualname__", type(on_collapse).__qualname__)


def _check_batches(keep: Any, skip: Any, on_collapse: Any) -> None:
    if keep != "auto" and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 0):
        raise ValueError(
            'keep_batches is a number of micro-batches, 0 for none, or "auto" for those that can '
            f"have caused an alarm; got {keep!r}"
        )
    if not isinstance(skip, bool):
        raise ValueError(f"skip_batches is True or False, got {skip!r}")
    if skip and on_collapse != "rollback":
        raise ValueError(
            "skip_batches=True says what a run does after it went back: it needs on_collapse="
            f'"rollback", got {on_collapse!r}'
        )


def _check_count(name: str, value: Any, least: int, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is a number of {what}, {least} or more, got {value!r}")

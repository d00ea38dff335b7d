"""What StabilityCallback's options may be; each is checked before training begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from torch import nn
from transformers import TrainingArguments

from hf_stable.measures.entropy import sample_queries
from hf_stable.monitor.batches.ring import KeepBatches
from hf_stable.monitor.readings import check_sharpness_can_be_measured
from hf_stable.monitor.records import check_maps, resolve_terms
from hf_stable.monitor.rollbacks import check_can_roll_back, check_can_skip
from hf_stable.monitor.terms import TERMS, names_of
from hf_stable.monitor.thresholds import Thresholds

__all__ = ["ACTIONS", "Console", "Options", "check_training", "refuse_cut_attention"]

ACTIONS = ("warn", "stop", "checkpoint", "rollback")

Console = Literal["short", "full", "off"]
"""How much of a record is printed: one short part, all keys, or none of the monitor's."""

_FUNCTION = "function "


@dataclass(frozen=True)
class Options:
    """StabilityCallback's options, which it explains; all are in range.

    Raises:
        ValueError: for one out of range, saying what is allowed.
    """

    every: int
    queries: Literal["all"] | int
    terms: Literal["default", "all"] | Sequence[str]
    maps: bool | Literal["all"] | Sequence[int]
    sharpness_every: int | None
    on_collapse: Any
    max_rollbacks: int
    rollback_lr_factor: float
    log_layers: bool
    console: Console
    thresholds: Any
    keep_batches: KeepBatches
    skip_batches: bool

    def __post_init__(self) -> None:
        """Check each of them, and those that depend on each other."""
        _check_count("every", self.every, 1, "steps")
        if self.sharpness_every is not None:
            _check_count("sharpness_every", self.sharpness_every, 1, "steps")
        _check_count("max_rollbacks", self.max_rollbacks, 0, "rollbacks")
        sample_queries(1, self.queries)
        resolve_terms(self.terms)
        check_maps(self.wanted_maps)
        _check_action(self.on_collapse)
        _check_batches(self.keep_batches, self.skip_batches, self.on_collapse)
        _check_factor(self.rollback_lr_factor, self.skip_batches)
        if self.console not in get_args(Console):
            raise ValueError(
                f"console is one of {', '.join(get_args(Console))}, got {self.console!r}"
            )
        object.__setattr__(self, "thresholds", as_thresholds(self.thresholds))

    @property
    def wanted_maps(self) -> Literal["all"] | Sequence[int]:
        """Heads whose maps are kept."""
        if isinstance(self.maps, bool):
            return "all" if self.maps else ()
        return self.maps

    def state(self) -> dict[str, Any]:
        """Return them as JSON holds them, by the names of StabilityCallback's arguments."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("terms", "maps"):
            if not isinstance(plain[name], str | bool):
                plain[name] = list(plain[name])
        plain["on_collapse"] = action_name(self.on_collapse)
        plain["thresholds"] = None if self.thresholds is None else asdict(self.thresholds)
        return plain


def check_training(args: TrainingArguments, model: nn.Module, saved: Any, options: Options) -> None:
    """Raise ValueError for what these options cannot do in this training.

    Args:
        args: of the Trainer.
        model: that it trains.
        saved: the callback's entry in the Trainer's state.
        options: of the callback.
    """
    if isinstance(saved, list):
        raise ValueError("this Trainer has two StabilityCallbacks: remove one of them")
    if callable(options.on_collapse) and args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "a checkpoint cannot hold on_collapse as a function: leave "
            "restore_callback_states_from_checkpoint out (progress is taken up without it)"
        )
    if options.on_collapse == "rollback":
        check_can_roll_back(args, model)
    if options.skip_batches:
        check_can_skip(args)
    if options.sharpness_every:
        check_sharpness_can_be_measured(args, model)


def refuse_cut_attention(terms: Any, setting: str) -> None:
    """Raise for terms of attention where processes share each sequence (context parallelism).

    Each of them has some of the queries and keys, whose entropy is not that of all.

    Args:
        terms: of the callback.
        setting: what cuts the sequences, as the caller may have written it.

    Raises:
        ValueError: if any of the terms needs attention.
    """
    chosen = resolve_terms(terms)
    needing = [n for n in TERMS if n in chosen and "attention" in TERMS[n].needs]
    if needing:
        rest = [name for name in names_of() if "attention" not in TERMS[name].needs]
        raise ValueError(
            f"{setting}: processes share each sequence, and none sees the attention that "
            f"{', '.join(needing)} are measured of. Give StabilityCallback terms that do without "
            f"it: {', '.join(rest)}"
        )


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


def _check_action(on_collapse: Any) -> None:
    if isinstance(on_collapse, str) and on_collapse.startswith(_FUNCTION):
        raise ValueError(
            f"on_collapse was the {on_collapse}, which a checkpoint does not hold: leave "
            "restore_callback_states_from_checkpoint out (progress is taken up without it)"
        )
    if not callable(on_collapse) and on_collapse not in ACTIONS:
        raise ValueError(
            f"on_collapse is one of {', '.join(ACTIONS)} or a function, got {on_collapse!r}"
        )


def _check_factor(factor: Any, skips: bool) -> None:
    is_kept = skips and factor == 1  # the rate was not to blame
    if not isinstance(factor, int | float) or not (0 < factor < 1 or is_kept):
        raise ValueError(
            "rollback_lr_factor lies between 0 and 1 (with skip_batches=True it may be 1), got "
            f"{factor!r}"
        )


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

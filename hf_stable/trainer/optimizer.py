"""`optim="adamw2"`: the name, what builds the optimizer, and its options."""

from __future__ import annotations

from typing import Any

from transformers import __version__

from hf_stable.adamw2.model_optimizer import ModelAdamW2
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.adamw2.options import parse_options
from hf_stable.adamw2.planning import AUTO
from hf_stable.trainer.changes import ADVICE, adding, wrapping
from hf_stable.trainer.schedules import steps_at_full_rate
from hf_stable.trainer.training_record import planned_steps

try:
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
    from transformers.training_args import OptimizerNames
except ImportError as error:
    raise ImportError(
        f"hf_stable does not fit transformers {__version__}: {error}. {ADVICE}"
    ) from error

__all__ = ["OPTIMIZER_NAME", "add_optimizer", "optimizer_name"]

OPTIMIZER_NAME = "adamw2"

adding(
    "transformers.training_args:OptimizerNames",
    reason='gains the member "adamw2"',
    is_added=lambda: OPTIMIZER_NAME in OptimizerNames._value2member_map_,
)
adding(
    "transformers.trainer_optimizer:_OPTIMIZER_HANDLERS",
    reason='gains the handler that builds AdamW2 for optim="adamw2"',
    is_added=lambda: _OPTIMIZER_HANDLERS.get(OPTIMIZER_NAME) is _build_adamw2,
)


def add_optimizer() -> None:
    """Let the Trainer know the name and what it builds for it; later calls change nothing."""
    _OPTIMIZER_HANDLERS[OPTIMIZER_NAME] = _build_adamw2
    members: Any = OptimizerNames
    if OPTIMIZER_NAME in members._value2member_map_:
        return
    name = OPTIMIZER_NAME.upper()
    member: Any = str.__new__(members, OPTIMIZER_NAME)
    member._name_, member._value_ = name, OPTIMIZER_NAME
    member.__objclass__ = members
    member._sort_order_ = len(members._member_names_)
    # A pickle (training_args.bin) names this function: reading it imports and registers.
    member.__reduce_ex__ = lambda protocol: (optimizer_name, (OPTIMIZER_NAME,))
    members._member_names_.append(name)
    members._member_map_[name] = member
    members._value2member_map_[OPTIMIZER_NAME] = member
    if hasattr(members, "_hashable_values_"):
        members._hashable_values_.append(OPTIMIZER_NAME)
    type.__setattr__(members, name, member)


def optimizer_name(value: str) -> OptimizerNames:
    """Return the member of a name: what pickles of the arguments of a training call."""
    return OptimizerNames(value)


def _build_adamw2(context: OptimizerContext) -> tuple[type[AdamW2], dict[str, Any]]:
    """Return what the Trainer builds for `optim="adamw2"`: the class, and its arguments."""
    options = parse_options(context.optim_args)
    arguments = {**context.optimizer_kwargs, **context.adam_kwargs, **options}
    return _of_model(context.model, context.args, arguments)


def _of_model(
    model: Any, args: Any, arguments: dict[str, Any]
) -> tuple[type[AdamW2], dict[str, Any]]:
    """Return the class that knows the structure of a model, and its arguments."""
    if arguments.get("tau") == AUTO and "total_steps" not in arguments:
        arguments = {**arguments, "total_steps": _total_steps(args)}
    if model is None:
        return AdamW2, arguments
    return ModelAdamW2, {**arguments, "structure": model}


@wrapping(
    "transformers.trainer:Trainer.create_optimizer", "model",
    reason='AdamW2 in optimizer_cls_and_kwargs gets the rates that optim="adamw2" gives',
)  # fmt: skip
def _create_optimizer(original: Any, trainer: Any, model: Any = None) -> Any:
    given = trainer.optimizer_cls_and_kwargs
    if given is None or given[0] is not AdamW2:
        return original(trainer, model)
    own = trainer.model if model is None else model
    trainer.optimizer_cls_and_kwargs = _of_model(own, trainer.args, given[1])
    try:
        return original(trainer, model)
    finally:
        trainer.optimizer_cls_and_kwargs = given


def _total_steps(args: Any) -> float:
    """Return the sum of the schedule over the steps of a run, for `tau=auto`.

    Raises:
        ValueError: if nothing says how many steps the run will have.
    """
    steps = planned_steps(args) or args.max_steps
    if steps < 1:
        raise ValueError(
            "optim_args has tau=auto, and how many steps the run will have is known only once "
            "train() has begun: let train() build the optimizer, or set max_steps, or give a "
            "number for tau"
        )
    return steps_at_full_rate(args, steps)


@wrapping(
    "transformers.trainer:_parse_optim_args", "optim_args_str",
    reason="an entry of optim_args without '=' gets an error that says so",
)  # fmt: skip
def _parse_optim_args(original: Any, optim_args_str: str | None) -> dict[str, str]:
    for entry in (optim_args_str or "").replace(" ", "").split(","):
        if optim_args_str and entry.count("=") != 1:
            raise ValueError(
                f"optim_args={optim_args_str!r}: {entry!r} is not of the form key=value; separate "
                "several by commas, as in 'tau=0.004,power_iterations=2'"
            )
    return original(optim_args_str)

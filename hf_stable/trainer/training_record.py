"""What a Trainer leaves on a patched model about a training: its settings, log and progress."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from hf_stable._ranks import inner_optimizer
from hf_stable.adamw2.planning import DEFAULT_TAU
from hf_stable.checkpoints.provenance import RECORD_ATTRIBUTE, base_model_of
from hf_stable.methods.layernorms.standalone import is_standalone
from hf_stable.methods.patching import is_patched

__all__ = ["keeping_record", "planned_steps", "provenance_of"]

_running: ContextVar[tuple[Any, bool] | None] = ContextVar("hf_stable_running", default=None)


@contextmanager
def keeping_record(trainer: Any) -> Iterator[None]:
    """Leave on a patched model what a Trainer's training inside this context was, however it ends.

    A model without LayerNorms counts as patched, and so does one that has the record of an earlier
    training, which would be quoted for this one.
    """
    token = _running.set((trainer, trainer.optimizer is not None))
    try:
        yield
    except BaseException:
        with suppress(Exception):  # what ended the training is what its caller must see
            _keep_record(trainer)
        raise
    else:
        _keep_record(trainer)
    finally:
        _running.reset(token)


def _keep_record(trainer: Any) -> None:
    model, state = _trained_by(trainer), trainer.state
    if model is not None and (
        is_patched(model) or is_standalone(model) or hasattr(model, RECORD_ATTRIBUTE)
    ):
        record = {
            "settings": _settings_in_force(model),
            # The Trainer's own list: what is evaluated after the training joins it.
            "log_history": state.log_history,
            "global_step": state.global_step,
            "epoch": state.epoch,
        }
        setattr(model, RECORD_ATTRIBUTE, record)


def planned_steps(args: Any) -> int | None:
    """Return the number of steps of the training under way that has these arguments, or None."""
    trainer, _ = _running.get() or (None, False)
    if trainer is None or trainer.args is not args:
        return None
    return trainer.state.max_steps or None


def provenance_of(model: Any) -> dict[str, Any]:
    """Return what a checkpoint is to keep of a model's provenance, as plain data."""
    found = {"base_model": base_model_of(model), "settings": _settings_in_force(model)}
    return {key: value for key, value in found.items() if value}


def _trained_by(trainer: Any) -> Any:
    """Return the Trainer's model, or None before a trial of a search has built it."""
    model = trainer.model
    return None if model is None else trainer.accelerator.unwrap_model(model)


def _settings_in_force(model: Any) -> dict[str, Any]:
    """Return the settings of the training that a model is in, or else was in last."""
    trainer, brings_optimizer = _running.get() or (None, False)
    if trainer is not None and _trained_by(trainer) is model:
        return _settings(trainer, brings_optimizer)
    return getattr(model, RECORD_ATTRIBUTE, {}).get("settings", {})


def _settings(trainer: Any, brings_optimizer: bool) -> dict[str, Any]:
    args, planned = trainer.args, trainer.state.max_steps
    processes = f"{args.world_size} process" + ("es" if args.world_size > 1 else "")
    batch = trainer.state.train_batch_size or args.train_batch_size
    mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    dtypes = (p.dtype for p in trainer.model.parameters() if p.is_floating_point())
    dtype = str(next(dtypes, "none")).removeprefix("torch.")
    warmup = args.get_warmup_steps(planned)
    return {
        **_optimizer_settings(trainer, brings_optimizer),
        "learning rate schedule": f"{args.lr_scheduler_type.value} over {planned} steps",
        "warmup steps": warmup,
        "batch size": f"{batch} x {args.gradient_accumulation_steps} accumulated x {processes}",
        "gradients clipped at norm": args.max_grad_norm,
        "precision": f"{mixed} autocast over {dtype} weights" if mixed else dtype,
        "seed": args.seed,
    }


def _optimizer_settings(trainer: Any, is_given: bool) -> dict[str, Any]:
    args = trainer.args
    if is_given:  # the optimizer's settings are not those in the arguments then
        optimizer = inner_optimizer(trainer.optimizer)
        return {"optimizer": f"{type(optimizer).__name__}, handed to the Trainer"}
    options = args.optim_args or ""
    if args.optim == "adamw2":
        options = ",".join(filter(None, [options, _chosen_tau(trainer, options)]))
    settings = {"optimizer": args.optim.value, "optimizer options": options}
    if "adam" in args.optim:
        settings["betas, epsilon"] = f"{args.adam_beta1}, {args.adam_beta2}, {args.adam_epsilon}"
    settings |= {"learning rate": args.learning_rate, "weight decay": args.weight_decay}
    return {key: value for key, value in settings.items() if value != ""}


def _chosen_tau(trainer: Any, options: str) -> str:
    """Return what `optim_args` do not say of tau: the default, or what "auto" came to."""
    if "tau" not in options:
        return f"tau={DEFAULT_TAU}"
    groups = getattr(inner_optimizer(trainer.optimizer), "param_groups", ())
    planned = [group for group in groups if group.get("total_steps") and group["tau"] < math.inf]
    return f"which is {planned[0]['tau']:.4g}" if planned else ""

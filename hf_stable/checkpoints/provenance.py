"""Where a model comes from: the model on the Hub that it started from, and its last training.

On a model in memory both are plain attributes, which no save_pretrained writes. A checkpoint has
them in the metadata of its sidecar and in `trainer_state.json`.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_stable._ranks import inner_optimizer
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.checkpoints.sidecar import read_provenance
from hf_stable.methods.layernorms.standalone import is_standalone
from hf_stable.methods.patching import is_patched

__all__ = [
    "TrainingRecord",
    "base_model_of",
    "has_training",
    "keeping_record",
    "provenance_of",
    "read_training",
    "record_of",
    "restore_provenance",
]

BASE_ATTRIBUTE = "hf_stable_base_model"
RECORD_ATTRIBUTE = "hf_stable_training"

Folder = str | os.PathLike[str]

_STATE_FILE = "trainer_state.json"
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second")
_running: ContextVar[tuple[Any, bool] | None] = ContextVar("hf_stable_running", default=None)


@dataclass(frozen=True)
class TrainingRecord:
    """What the Trainer left about a training.

    Attributes:
        settings: what the training was asked for and how far it got, as far as that is known.
        metrics: the last value of everything that was evaluated, without the prefix `eval_`.
        history: everything that was logged, in order.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def keeping_record(trainer: Any) -> Iterator[None]:
    """Leave on a patched model what a Trainer's training inside this context was, however it ends.

    A model without LayerNorms counts as patched, and so does one that has the record of an earlier
    training, which would be quoted for this one.
    """
    token = _running.set((trainer, trainer.optimizer is not None))
    try:
        yield
    finally:
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
        _running.reset(token)


def record_of(model: Any) -> TrainingRecord:
    """Return what the last training in this process left on a model; empty where there was none."""
    record = getattr(model, RECORD_ATTRIBUTE, None)
    return TrainingRecord() if record is None else _record(record["settings"], record)


def has_training(folder: Folder) -> bool:
    """Say whether a folder has the state that the Trainer writes beside a checkpoint."""
    return os.path.isfile(os.path.join(folder, _STATE_FILE))


def read_training(folder: Folder) -> TrainingRecord:
    """Read what a checkpoint's `trainer_state.json` and sidecar say of the training.

    Raises:
        FileNotFoundError: if there is no `trainer_state.json`.
        ValueError: if a file is damaged.
    """
    path = os.path.join(folder, _STATE_FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} is missing, so there is no training to quote; give a folder that the Trainer "
            "wrote, a checkpoint for example"
        )
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        settings = read_provenance(folder).get("settings", {})
        settings = settings or {"batch size per device": state.get("train_batch_size")}
        return _record(settings, state)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); give another checkpoint") from error


def base_model_of(model: Any) -> str | None:
    """Return the Hub's id of the model that this one started from, never the name of a folder."""
    name = getattr(model, BASE_ATTRIBUTE, None) or model.config.name_or_path
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not os.path.exists(name) else None


def provenance_of(model: Any) -> dict[str, Any]:
    """Return what a checkpoint is to keep of a model's provenance, as plain data."""
    found = {"base_model": base_model_of(model), "settings": _settings_in_force(model)}
    return {key: value for key, value in found.items() if value}


def restore_provenance(model: Any, provenance: Mapping[str, Any]) -> None:
    """Give a model that was loaded from a checkpoint back what it started from.

    Not as its `name_or_path`: PEFT writes that down as the weights that an adapter goes on. The
    settings stay behind, for the model that is trained on from here has others.
    """
    if base_model := provenance.get("base_model"):
        setattr(model, BASE_ATTRIBUTE, base_model)


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
    dtype = str(trainer.model.dtype).removeprefix("torch.")
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
    if args.optim == "adamw2" and "tau" not in options:
        options = ",".join(filter(None, [options, f"tau={_default_tau()}"]))
    settings = {"optimizer": args.optim.value, "optimizer options": options}
    if "adam" in args.optim:
        settings["betas, epsilon"] = f"{args.adam_beta1}, {args.adam_beta2}, {args.adam_epsilon}"
    settings |= {"learning rate": args.learning_rate, "weight decay": args.weight_decay}
    return {key: value for key, value in settings.items() if value != ""}


def _default_tau() -> float:
    return inspect.signature(AdamW2).parameters["tau"].default


def _record(settings: Mapping[str, Any], state: Mapping[str, Any]) -> TrainingRecord:
    history = state["log_history"]
    rates = [record["learning_rate"] for record in history if "learning_rate" in record]
    found = {
        **settings,
        "optimizer steps": state["global_step"],
        "epochs": state.get("epoch"),
        "peak learning rate": max(rates, default=None),
    }
    last: dict[str, Any] = {}
    for record in history:
        last |= record
    metrics = {
        name.removeprefix("eval_"): value
        for name, value in last.items()
        if name.startswith("eval_") and not name.endswith(_NO_METRICS)
    }
    known = {key: value for key, value in found.items() if value is not None}
    return TrainingRecord(known, metrics, history)

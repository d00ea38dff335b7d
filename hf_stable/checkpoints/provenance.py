"""Where a model comes from: the model on the Hub that it started from, and its last training.

On a model in memory both are plain attributes, which no save_pretrained writes. A checkpoint has
them in the metadata of its sidecar and in `trainer_state.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_stable._file_names import TRAINER_STATE_FILE
from hf_stable.checkpoints.sidecar import read_provenance

__all__ = [
    "RECORD_ATTRIBUTE",
    "TrainingRecord",
    "base_model_of",
    "has_training",
    "read_training",
    "record_of",
    "restore_provenance",
]

BASE_ATTRIBUTE = "hf_stable_base_model"
RECORD_ATTRIBUTE = "hf_stable_training"

Folder = str | os.PathLike[str]

_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second")


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


def record_of(model: Any) -> TrainingRecord:
    """Return what the last training in this process left on a model; empty where there was none."""
    record = getattr(model, RECORD_ATTRIBUTE, None)
    return TrainingRecord() if record is None else _record(record["settings"], record)


def has_training(folder: Folder) -> bool:
    """Say whether a folder has the state that the Trainer writes beside a checkpoint."""
    return os.path.isfile(os.path.join(folder, TRAINER_STATE_FILE))


def read_training(folder: Folder) -> TrainingRecord:
    """Read what a checkpoint's `trainer_state.json` and sidecar say of the training.

    Raises:
        FileNotFoundError: if there is no `trainer_state.json`.
        ValueError: if a file is damaged.
    """
    path = os.path.join(folder, TRAINER_STATE_FILE)
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
    config = getattr(model, "config", None)  # a module that only holds a model has none
    name = getattr(model, BASE_ATTRIBUTE, None) or getattr(config, "name_or_path", "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not os.path.exists(name) else None


def restore_provenance(model: Any, provenance: Mapping[str, Any]) -> None:
    """Give a model that was loaded from a checkpoint back what it started from.

    Not as its `name_or_path`: PEFT writes that down as the weights that an adapter goes on. The
    settings stay behind, for the model that is trained on from here has others.
    """
    if base_model := provenance.get("base_model"):
        setattr(model, BASE_ATTRIBUTE, base_model)


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

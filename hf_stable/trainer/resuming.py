"""What hf_stable changes where the Trainer picks and loads checkpoints."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_stable._ranks import inner_optimizer
from hf_stable.adamw2.model_optimizer import part_schedule
from hf_stable.checkpoints.completeness import is_complete, newest_complete
from hf_stable.checkpoints.continuing import restoring
from hf_stable.checkpoints.key_renaming import key_renaming
from hf_stable.trainer.changes import wrapping
from hf_stable.trainer.saving import has_adapters

__all__: list[str] = []


@wrapping(
    "transformers.trainer:Trainer._load_from_checkpoint", "resume_from_checkpoint", "model",
    reason="renames native keys (also for plain models) and restores a patched model exactly",
)  # fmt: skip
def _load_from_checkpoint(
    original: Any, trainer: Any, resume_from_checkpoint: str, model: nn.Module | None = None
) -> None:
    target = trainer.model if model is None else model
    if not _loads_whole_weights(trainer, target):
        return original(trainer, resume_from_checkpoint, model)
    with restoring(target, resume_from_checkpoint, _renaming(target)):
        return original(trainer, resume_from_checkpoint, model)


@wrapping(
    "transformers.trainer:Trainer._load_best_model",
    reason="the same for load_best_model_at_end",
)
def _load_best_model(original: Any, trainer: Any) -> None:
    if not _loads_whole_weights(trainer, trainer.model):
        return original(trainer)
    folder = trainer.state.best_model_checkpoint
    with restoring(trainer.model, folder, _renaming(trainer.model)):
        return original(trainer)


@wrapping(
    "transformers.trainer:Trainer._load_optimizer_and_scheduler", "checkpoint",
    reason='optim="adamw2" continues the schedule of a checkpoint that AdamW wrote',
)  # fmt: skip
def _load_optimizer_and_scheduler(original: Any, trainer: Any, checkpoint: str | None) -> None:
    original(trainer, checkpoint)
    optimizer = inner_optimizer(trainer.optimizer)
    part_schedule(trainer.lr_scheduler, optimizer)


def _loads_whole_weights(trainer: Any, model: nn.Module) -> bool:
    # FSDP keeps raw state dicts of its own, under the names in memory: exact as they are.
    return (
        isinstance(model, PreTrainedModel)
        and not trainer.is_fsdp_enabled
        and not trainer.is_deepspeed_enabled
        and not has_adapters(model)
    )


def _renaming(model: PreTrainedModel) -> Any:
    return key_renaming(model, getattr(model, "_weight_conversions", None))


@wrapping(
    "transformers.trainer:get_last_checkpoint", "folder",
    reason="resume_from_checkpoint=True skips, with a warning, what was not saved to the end",
)  # fmt: skip
def _get_last_checkpoint(original: Any, folder: str) -> str | None:
    last = original(folder)
    if last is None or is_complete(last):
        return last
    complete = newest_complete(folder)
    warnings.warn(
        f"{last} was not saved to the end (its trainer_state.json or a weights file is missing or "
        f"cut short); resuming from {complete or 'nothing'} instead",
        UserWarning,
        stacklevel=3,
    )
    return complete

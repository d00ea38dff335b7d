"""What hf_stable changes where the Trainer picks and loads checkpoints."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from hf_stable._ranks import inner_optimizer
from hf_stable.adamw2.model_optimizer import part_schedule
from hf_stable.checkpoints.completeness import is_complete, newest_complete
from hf_stable.checkpoints.continuing import restoring, restoring_where_possible
from hf_stable.checkpoints.key_renaming import key_renaming
from hf_stable.methods.patching import is_patched
from hf_stable.trainer.changes import wrapping
from hf_stable.trainer.saving import has_adapters, is_adapted

__all__ = ["watching_own_ways"]


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
        (isinstance(model, PreTrainedModel) or is_patched(model))
        and not trainer.is_fsdp_enabled
        and not trainer.is_deepspeed_enabled
        and not has_adapters(model)
        and not is_adapted(model)
    )


def _renaming(model: nn.Module) -> Any:
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        return key_renaming(model, getattr(model, "_weight_conversions", None))
    return lambda key: key  # a module of the user's is saved under the names in memory


_FOLDERS = {
    "_load_from_checkpoint": lambda trainer, folder=None, *args, **kwargs: folder,
    "_load_best_model": lambda trainer: trainer.state.best_model_checkpoint,
}
"""The methods by which a Trainer loads a checkpoint, and where that is."""


@contextmanager
def watching_own_ways(trainer: Any) -> Iterator[None]:
    """Let the sidecars be found where a Trainer loads checkpoints in another way than its class's.

    Subclasses override these methods without calling the original, so it is the object that is
    watched while it trains.
    """
    own = [n for n in _FOLDERS if getattr(type(trainer), n, None) is not getattr(Trainer, n)]
    before = {name: trainer.__dict__.get(name) for name in own}
    busy: list[str] = []
    for name in own:
        load = getattr(trainer, name)
        trainer.__dict__[name] = _finding_sidecars(trainer, load, _FOLDERS[name], busy)
    try:
        yield
    finally:
        for name, method in before.items():
            del trainer.__dict__[name]
            if method is not None:
                trainer.__dict__[name] = method


def _finding_sidecars(trainer: Any, load: Any, folder_of: Any, busy: list[str]) -> Any:
    @functools.wraps(load)
    def load_exactly(*args: Any, **kwargs: Any) -> Any:
        folder = folder_of(trainer, *args, **kwargs)
        # One may call the other, which need not look again.
        if folder is None or busy or not _loads_whole_weights(trainer, trainer.model):
            return load(*args, **kwargs)
        busy.append(folder)
        try:
            with restoring_where_possible(trainer.model, folder):
                return load(*args, **kwargs)
        finally:
            busy.pop()

    return load_exactly


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

"""What hf_stable changes where the Trainer picks and loads checkpoints."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_stable._ranks import inner_optimizer
from hf_stable.adamw2.model_optimizer import part_schedule
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.checkpoints.completeness import (
    OPTIMIZER_FILE,
    Expected,
    damage_in,
    is_complete,
    missing_from,
    newest_complete,
)
from hf_stable.checkpoints.continuing import restoring, restoring_where_possible
from hf_stable.checkpoints.key_renaming import KeyConversion
from hf_stable.checkpoints.weight_files import open_weights
from hf_stable.methods.patching import is_patched
from hf_stable.trainer.changes import wrapping
from hf_stable.trainer.saving import has_adapters, is_adapted

__all__ = ["watching_own_ways"]

_training: ContextVar[Any] = ContextVar("hf_stable_training", default=None)
"""The Trainer that is training, where there is one."""


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
    with _restoring(target, resume_from_checkpoint):
        return original(trainer, resume_from_checkpoint, model)


@wrapping(
    "transformers.trainer:Trainer._load_best_model",
    reason="renames and restores the same way for load_best_model_at_end",
)
def _load_best_model(original: Any, trainer: Any) -> None:
    if not _loads_whole_weights(trainer, trainer.model):
        return original(trainer)
    folder = trainer.state.best_model_checkpoint
    with _restoring(trainer.model, folder):
        return original(trainer)


@wrapping(
    "transformers.trainer:Trainer._load_optimizer_and_scheduler", "checkpoint",
    reason='says which file of a checkpoint is missing or damaged; optim="adamw2" continues the '
    "schedule that AdamW wrote",
)  # fmt: skip
def _load_optimizer_and_scheduler(original: Any, trainer: Any, checkpoint: str | None) -> None:
    optimizer = inner_optimizer(trainer.optimizer)
    if checkpoint is not None:
        _check_resumed(trainer, checkpoint)
    try:
        original(trainer, checkpoint)
    except ValueError as error:
        if checkpoint is None or isinstance(optimizer, AdamW2) or not _is_of_adamw2(checkpoint):
            raise
        raise ValueError(
            f"{checkpoint} was saved with AdamW2, and {type(optimizer).__name__} has no such "
            f'groups of parameters ({error}). Resume it with optim="adamw2"; to go on with another '
            "optimizer, load the weights with hf_stable.load or from_pretrained, and train without "
            "resuming"
        ) from error
    part_schedule(trainer.lr_scheduler, optimizer)


def _is_of_adamw2(checkpoint: str) -> bool:
    path = os.path.join(checkpoint, OPTIMIZER_FILE)
    if not os.path.isfile(path):
        return False
    groups = torch.load(path, weights_only=True, mmap=True, map_location="cpu")["param_groups"]
    return any("tau" in group for group in groups)


def _loads_whole_weights(trainer: Any, model: nn.Module) -> bool:
    # FSDP keeps raw state dicts of its own, under the names in memory: exact as they are.
    return (
        (isinstance(model, PreTrainedModel) or is_patched(model))
        and not trainer.is_fsdp_enabled
        and not trainer.is_deepspeed_enabled
        and not has_adapters(model)
        and not is_adapted(model)
    )


def _restoring(model: nn.Module, folder: str) -> AbstractContextManager[None]:
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PreTrainedModel):
        # A module of the user's is saved under the names in memory.
        return restoring(model, folder, lambda state_dict: state_dict)
    conversions = getattr(inner, "_weight_conversions", None)
    conversion = KeyConversion(inner, conversions, keys=_keys_in(folder))
    # What the model makes itself, such as a table of sines.
    return restoring(model, folder, conversion, inner._keys_to_ignore_on_save or ())


def _keys_in(folder: str) -> list[str] | None:
    """Return the names of all tensors in a checkpoint, or None where they are not known.

    Pickles are in one state dict, and what is damaged or missing is refused by what loads it.
    """
    try:
        return list(open_weights(folder).shapes)
    except (OSError, ValueError):
        return None


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
    own = _own_ways(trainer)
    before = {name: trainer.__dict__.get(name) for name in own}
    busy: list[str] = []
    token = _training.set(trainer)
    for name in own:
        load = getattr(trainer, name)
        trainer.__dict__[name] = _finding_sidecars(trainer, load, _FOLDERS[name], busy)
    try:
        yield
    finally:
        _training.reset(token)
        for name, method in before.items():
            del trainer.__dict__[name]
            if method is not None:
                trainer.__dict__[name] = method


def _own_ways(trainer: Any) -> list[str]:
    # Not above: a transformers that does not fit is to be named, and this import would fail first.
    from transformers import Trainer

    return [n for n in _FOLDERS if getattr(type(trainer), n, None) is not getattr(Trainer, n)]


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
    expected = _expected_of(_training.get())
    if last is None or is_complete(last, expected):
        return last
    complete = newest_complete(folder, expected)
    warnings.warn(
        f"{last} was not saved to the end: {_problem_with(last, expected)}; resuming from "
        f"{complete or 'nothing'} instead",
        UserWarning,
        stacklevel=3,
    )
    return complete


def _check_resumed(trainer: Any, checkpoint: str) -> None:
    """Raise for a damaged checkpoint, and warn of one without which a run goes on as another."""
    expected = _expected_of(trainer)
    problem = _problem_with(checkpoint, expected)
    if problem is None:
        return
    better = newest_complete(os.path.dirname(os.path.abspath(checkpoint)), expected)
    advice = f"; {better} is complete" if better else ""
    if damage_in(checkpoint):
        raise ValueError(f"{checkpoint} cannot be resumed: {problem}{advice}")
    warnings.warn(
        f"{checkpoint}: {problem}. What is in there starts anew, so this is not the run that was "
        f"interrupted{advice}",
        UserWarning,
        stacklevel=3,
    )


def _problem_with(checkpoint: str, expected: Expected) -> str | None:
    missing = missing_from(checkpoint, expected)
    return f"it has no {', '.join(missing)}" if missing else damage_in(checkpoint)


def _expected_of(trainer: Any) -> Expected:
    """Return what a Trainer writes into each checkpoint; nothing is known of no Trainer."""
    if trainer is None or trainer.args.save_only_model:
        return Expected()
    by_engine = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    scaler = getattr(trainer.accelerator, "scaler", None)
    return Expected(
        optimizer=not by_engine,
        scaler=scaler is not None and not by_engine,
        sidecar=is_patched(trainer.model) and not by_engine and not _own_ways(trainer),
    )

"""How a Trainer serves callbacks that watch it: losses, values for its records, going back.

A callback takes part by having one of the methods `observe_batch(inputs, loss_of)`,
`observe_loss(loss, loss_again)`, `loss_of_skipped() -> what stands for the loss of a micro-batch
that is not trained on, or None`, `take_pending_logs() -> dict`,
`shorten_record(record) -> what is printed of it`, `expect_checkpoints_in(folder)`,
`take_rollback() -> checkpoint folder or None`, `why_it_stopped() -> reason or None`,
`abandon_step()` and `refuse_cut_sequences(setting)`. The Trainer's methods that call these
functions are wrapped in `training`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend

__all__ = [
    "log_with_pending",
    "observing_step",
    "printing",
    "refuse_cut_sequences",
    "train_with_rollbacks",
]

_TRACKERS = "transformers.integrations"

_shortening: ContextVar[Sequence[Callable[[Any], dict[str, Any]]]] = ContextVar(
    "hf_stable_shortening", default=()
)
"""What shortens the record that is being logged, for those who print it."""


def observing_step(
    original: Callable[..., Tensor],
    loss_of: Callable[[Any], Tensor],
    trainer: Any,
    model: Any,
    inputs: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run `Trainer.training_step`, and show its inputs and its loss to the callbacks that watch.

    They are given a way to compute the loss once more, too. Where one of them skips the step,
    nothing runs.
    """
    callbacks = trainer.callback_handler.callbacks
    for callback in callbacks:
        if hasattr(callback, "loss_of_skipped"):
            loss = callback.loss_of_skipped()
            if loss is not None:
                share = loss / trainer.current_gradient_accumulation_steps
                return torch.tensor(share, device=trainer.args.device)
    for callback in callbacks:
        if hasattr(callback, "observe_batch"):
            callback.observe_batch(inputs, loss_of)
    loss = original(trainer, model, inputs, *args, **kwargs)
    for callback in callbacks:
        if hasattr(callback, "observe_loss"):
            callback.observe_loss(loss, lambda: loss_of(inputs))
    return loss


def log_with_pending(
    original: Callable[..., None], trainer: Any, logs: dict[str, float], *args: Any, **kwargs: Any
) -> None:
    """Run `Trainer.log` with the values that callbacks hold ready in its record.

    Where there is such a callback, a tracker of transformers that fails on a record is taken out
    of the Trainer with one warning, and training goes on. What trackers do at other events, such
    as their setup when training begins, is theirs.
    """
    watching = [c for c in trainer.callback_handler.callbacks if hasattr(c, "take_pending_logs")]
    if not watching:
        return original(trainer, logs, *args, **kwargs)
    pending: dict[str, float] = {}
    for callback in watching:
        pending |= callback.take_pending_logs()
    # The caller keeps using its dict, as metrics: it gets what the Trainer adds, not ours.
    record = {**logs, **pending}
    token = _shortening.set([c.shorten_record for c in watching if hasattr(c, "shorten_record")])
    try:
        original(trainer, record, *args, **kwargs)
    except Exception as error:
        _go_on_without_trackers(trainer, record, error)
    finally:
        _shortening.reset(token)
    logs.update({key: value for key, value in record.items() if key not in pending})


def printing(
    original: Callable[..., None],
    printer: TrainerCallback,
    args: Any,
    state: Any,
    control: Any,
    logs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Run `on_log` of a callback that prints records, with what is to be printed of this one."""
    shown = logs
    for shorten in _shortening.get() if logs is not None else []:
        shown = shorten(shown)
    before = set(shown or ())
    original(printer, args, state, control, logs=shown, **kwargs)
    if logs is not None and shown is not logs:
        for key in before - set(shown or ()):  # the printer takes a key out for those after it
            logs.pop(key, None)


def train_with_rollbacks(
    original: Callable[..., Any],
    trainer: Any,
    resume_from_checkpoint: str | bool | None = None,
    trial: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run `Trainer.train`, again from a checkpoint as often as a callback asks for it.

    Whatever ends it, Ctrl-C included, callbacks undo what they have done to the model for a step.
    A trial of a search that a callback has stopped does not count as finished.
    """
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "expect_checkpoints_in"):
            # Each trial of a search for hyperparameters has a folder of its own.
            callback.expect_checkpoints_in(trainer._get_output_dir(trial))
    try:
        result = original(trainer, resume_from_checkpoint, trial, *args, **kwargs)
        while (folder := _rollback(trainer)) is not None:
            result = original(trainer, folder, trial, *args, **kwargs)
    except BaseException:
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "abandon_step"):
                callback.abandon_step()
        raise
    for callback in trainer.callback_handler.callbacks if trial is not None else ():
        if hasattr(callback, "why_it_stopped") and (why := callback.why_it_stopped()) is not None:
            _end_trial(trainer, why)
    return result


def _end_trial(trainer: Any, why: str) -> None:
    """End a trial of a search as one that was broken off, where the backend has such.

    Raises:
        optuna.TrialPruned: of optuna, on the process that runs the search.
    """
    if trainer.hp_search_backend != HPSearchBackend.OPTUNA:
        warnings.warn(
            f"this trial was stopped ({why}), and {trainer.hp_search_backend} counts it as "
            "finished: its objective is that of the model as it is",
            UserWarning,
            stacklevel=5,
        )
    elif trainer.args.process_index:
        trainer.objective = math.nan  # the first process ends it; nobody is to evaluate alone
    else:
        import optuna

        raise optuna.TrialPruned(f"hf-stable stopped this trial: {why}")


def _rollback(trainer: Any) -> str | None:
    for callback in trainer.callback_handler.callbacks:
        folder = callback.take_rollback() if hasattr(callback, "take_rollback") else None
        if folder is not None:
            return folder
    return None


def _go_on_without_trackers(trainer: Any, record: dict[str, float], error: Exception) -> None:
    """Take out the tracker that raised, and let those after it have the record, until none fails.

    Raises:
        Exception: an error that is no tracker's.
    """
    handler, failure = trainer.callback_handler, error
    while True:
        tracker = _failed_tracker(failure.__traceback__)
        if tracker not in handler.callbacks:
            raise failure
        later = handler.callbacks[handler.callbacks.index(tracker) + 1 :]
        handler.remove_callback(tracker)
        warnings.warn(
            f"{type(tracker).__name__} failed at step {trainer.state.global_step} and gets no more "
            f"records; training goes on ({type(failure).__name__}: {failure})",
            UserWarning,
            stacklevel=5,
        )
        everyone, handler.callbacks = handler.callbacks, later
        try:
            trainer.control = handler.on_log(trainer.args, trainer.state, trainer.control, record)
            return
        except Exception as following:
            failure = following
        finally:
            handler.callbacks = everyone


def _failed_tracker(trace: TracebackType | None) -> TrainerCallback | None:
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, TrainerCallback) and type(owner).__module__.startswith(_TRACKERS):
            return owner
        trace = trace.tb_next
    return None


def refuse_cut_sequences(trainer: Any) -> None:
    """Let callbacks raise that cannot watch a run in which processes share each sequence.

    Raises:
        ValueError: under context or sequence parallelism, if a callback says so.
    """
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is None or not (parallelism.cp_enabled or parallelism.sp_enabled):
        return
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "refuse_cut_sequences"):
            callback.refuse_cut_sequences(
                f"cp_size={parallelism.cp_size}, sp_size={parallelism.sp_size}"
            )

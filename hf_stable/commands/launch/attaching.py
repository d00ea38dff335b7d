"""What `hf-stable run` does to every Trainer that a script builds: patch, watch, fold."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import Trainer

from hf_stable.commands.launch.options import RunOptions
from hf_stable.methods.describing import describe
from hf_stable.methods.patching import fold, patch
from hf_stable.monitor.callback import StabilityCallback
from hf_stable.trainer.changes import make, wrapping

__all__ = ["LAUNCHER", "Attachment", "attach"]

LAUNCHER = "hf-stable run"


def attach(options: RunOptions) -> Attachment:
    """Attach to every Trainer that this process builds from now on.

    A Trainer, or a subclass of it, comes out of its constructor with its model patched and the
    monitor among its callbacks; no optimizer exists at that moment. Models that `model_init`
    makes later are patched as they are made.
    """
    global _attachment
    _attachment = Attachment(options)
    make(LAUNCHER)
    return _attachment


@wrapping(
    "transformers.trainer:Trainer.__init__",
    reason="each new Trainer's model is patched and the monitor added, as the options say",
    made_by=LAUNCHER,
)
def _build_and_attach(build: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    build(trainer, *args, **kwargs)
    _attachment.add(trainer)


@wrapping(
    "transformers.trainer:Trainer.train",
    reason="under --fold-at-end the model is folded when the training ends",
    made_by=LAUNCHER,
)
def _train_and_fold(train: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    if not _attachment.folds(trainer):
        return train(trainer, *args, **kwargs)
    _attachment.refuse_folded(trainer)
    _attachment.training.add(trainer)
    try:
        result = train(trainer, *args, **kwargs)
    finally:
        _attachment.training.discard(trainer)
    _attachment.fold(trainer)
    return result


@dataclass
class Attachment:
    """What the launcher does to each Trainer, and what it has done so far."""

    options: RunOptions
    num_trainers: int = 0
    training: WeakSet[Trainer] = field(default_factory=WeakSet)
    folded: WeakSet[nn.Module] = field(default_factory=WeakSet)

    def add(self, trainer: Trainer) -> None:
        """Patch the model of a new Trainer and add the monitor.

        Raises:
            RuntimeError: if the script handed its own optimizer to the Trainer.
        """
        self.num_trainers += 1
        if self.options.patch:
            if trainer.optimizer is not None:
                raise RuntimeError(
                    "hf-stable run cannot patch a model whose optimizer exists already: gamma "
                    "would not be in it. Let the Trainer build the optimizer (optim=..., "
                    "optimizer_cls_and_kwargs=...), or call hf_stable.patch in the script, before "
                    "the optimizer is built"
                )
            self._patch(trainer.model)
            if trainer.model_init is not None:
                trainer.model_init = self._patching(trainer.model_init)
        if self.options.monitors:
            trainer.add_callback(self._monitor())

    def folds(self, trainer: Trainer) -> bool:
        """Say whether a training that begins is to be folded at its end.

        One that begins inside another is part of it (a batch size that was too large).
        """
        return self.options.fold_at_end and trainer not in self.training

    def fold(self, trainer: Trainer) -> None:
        """Fold the trained model in place."""
        fold(trainer.model)
        self.folded.add(trainer.model)
        _say(f"folded {type(trainer.model).__name__}")

    def refuse_folded(self, trainer: Trainer) -> None:
        """Raise if a model that was folded after its training is to be trained on."""
        if trainer.model_init is None and trainer.model in self.folded:
            raise RuntimeError(
                "--fold-at-end folded this model when its first Trainer.train ended, so training "
                "it again would train a plain model. Leave --fold-at-end out: every folder that "
                "the Trainer saves holds folded weights all the same"
            )

    def conclude(self, command: Sequence[str]) -> None:
        """Say so if the script never built a Trainer although something was to be attached."""
        wanted = self.options.patch or self.options.monitors or self.options.fold_at_end
        if wanted and not self.num_trainers:
            _say(
                f"nothing was patched or watched: {' '.join(command[:2])} built no transformers "
                "Trainer. In a loop of your own call hf_stable.patch(model, ...) before the "
                "optimizer is built"
            )

    def _patch(self, model: nn.Module) -> None:
        patch(model, self.options.patch)
        report = describe(model)
        names = ", ".join(config.method for config in self.options.patch)
        removed = f", {len(report.removed_norms)} norms removed" * bool(report.removed_norms)
        done = f"{report.num_patched} of {len(report.layers)} layers{removed}"
        _say(f"{names} on {report.model}: {done}")

    def _patching(self, model_init: Any) -> Any:
        @functools.wraps(model_init)  # the Trainer counts its arguments
        def init_and_patch(*args: Any) -> nn.Module:
            model = model_init(*args)
            self._patch(model)
            return model

        return init_and_patch

    def _monitor(self) -> Any:
        options = {"every": self.options.monitor, "on_collapse": self.options.on_collapse}
        given: dict[str, Any] = {
            name: value for name, value in options.items() if value is not None
        }
        _say(f"StabilityCallback({', '.join(f'{k}={v!r}' for k, v in given.items())}) added")
        return StabilityCallback(**given)


_attachment = Attachment(RunOptions())
"""What the script of this process runs with."""


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"hf-stable run: {message}", file=sys.stderr, flush=True)

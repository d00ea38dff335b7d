"""What `hf-stable run` does to every Trainer that a script builds: patch, watch, fold."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from transformers import Trainer

from hf_stable._wording import printable
from hf_stable.commands.launch.growth import GrowthCheck
from hf_stable.commands.launch.options import RunOptions
from hf_stable.methods.describing import PatchReport, describe
from hf_stable.methods.patching import fold, patch
from hf_stable.monitor.callback import StabilityCallback
from hf_stable.trainer.changes import adding, make, wrapping

__all__ = ["LAUNCHER", "Attachment", "attach"]

LAUNCHER = "hf-stable run"


def attach(options: RunOptions, script: str) -> Attachment:
    """Attach to every Trainer that this process builds from now on.

    A Trainer, or a subclass of it, comes out of its constructor with its model patched and the
    monitor among its callbacks; no optimizer exists at that moment. Models that `model_init`
    makes later are patched as they are made.

    Args:
        options: what to attach.
        script: what messages call the script.
    """
    global _attachment
    _attachment = Attachment(options, script)
    make(LAUNCHER)
    if options.attaches:
        _watch_steps()
    return _attachment


adding(
    "torch.optim.optimizer:register_optimizer_step_pre_hook",
    reason="a script that steps an optimizer before it has built a Trainer is told so",
    is_added=lambda: _hook is not None,
    made_by=LAUNCHER,
)

_hook: RemovableHandle | None = None


def _watch_steps() -> None:
    """Have a script that steps without a Trainer told so when it begins to."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(lambda *_: _attachment.conclude())


@wrapping(
    "transformers.trainer:Trainer.__init__",
    reason="each new Trainer's model is patched and the monitor added, as the options say",
    made_by=LAUNCHER,
)
def _build_and_attach(build: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    build(trainer, *args, **kwargs)
    _attachment.add(trainer)
    trainer.add_callback(GrowthCheck(_say))


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
    script: str = "the script"
    num_trainers: int = 0
    refusal: Exception | None = None
    has_concluded: bool = False
    training: WeakSet[Trainer] = field(default_factory=WeakSet)
    folded: WeakSet[nn.Module] = field(default_factory=WeakSet)

    def add(self, trainer: Trainer) -> None:
        """Patch the model of a new Trainer and add the monitor.

        Raises:
            RuntimeError: if the script handed its own optimizer to the Trainer.
        """
        self.num_trainers += 1
        try:
            self._attach(trainer)
        except (ValueError, TypeError, RuntimeError) as error:
            self.refusal = error  # who ends with it needs no trace
            raise

    def _attach(self, trainer: Trainer) -> None:
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
        if given := self.options.monitor_options:
            _say(f"StabilityCallback({', '.join(f'{k}={v!r}' for k, v in given.items())}) added")
            trainer.add_callback(StabilityCallback(**given))

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

    def conclude(self) -> None:
        """Say so once if no Trainer was built although something was to be attached."""
        if self.options.attaches and not self.num_trainers and not self.has_concluded:
            self.has_concluded = True
            _say(
                f"nothing is patched or watched: {self.script} built no transformers Trainer so "
                "far. In a loop of your own call hf_stable.patch(model, ...) before the optimizer "
                "is built"
            )

    def _patch(self, model: nn.Module) -> None:
        patch(model, self.options.patch)
        report = describe(model)
        names = ", ".join(config.method for config in self.options.patch)
        removed = f", {len(report.removed_norms)} norms removed" * bool(report.removed_norms)
        done = f"{report.num_patched} of {len(report.layers)} layers{removed}"
        _say(f"{names} on {report.model}: {done}{_left_out(report)}")

    def _patching(self, model_init: Any) -> Any:
        @functools.wraps(model_init)  # the Trainer counts its arguments
        def init_and_patch(*args: Any) -> nn.Module:
            model = model_init(*args)
            self._patch(model)
            return model

        return init_and_patch


def _left_out(report: PatchReport) -> str:
    """Say which layers were not patched, and why; nothing where all or none were."""
    reasons: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.skipped is not None:
            reasons.setdefault(layer.skipped, []).append(layer.name)
    if not report.num_patched or not reasons:
        return ""
    parts = [
        f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)} ({reason})"
        for reason, names in reasons.items()
    ]
    return f"; left out {', '.join(parts)}"


_attachment = Attachment(RunOptions())
"""What the script of this process runs with."""


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"hf-stable run: {printable(message)}", file=sys.stderr, flush=True)

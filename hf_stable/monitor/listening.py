"""Who hears of what a module does within a probe: one recorder, for the model's replicas too.

nn.DataParallel runs copies of a model's modules, with all that they carry: so each module of a
model that is probed carries the recorder, and says which of the model's own modules it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from hf_stable.monitor.recorder import Recorder
from hf_stable.monitor.unseen import Sightings

__all__ = ["Listener", "is_listened_to", "listener_of", "listening"]

KEY = "_hf_stable_listener"


class Listener:
    """What a module carries while it is listened to; a copy or a pickle of it carries nothing.

    Attributes:
        module: the module of the model, also where a replica carries this.
        recorder: to which values go.
        sightings: to which it goes that something ran.
    """

    def __init__(
        self, module: nn.Module, recorder: Recorder, sightings: Sightings, handles: list[Any]
    ) -> None:
        """Remember who listens, and by which hooks."""
        self.module = module
        self.recorder = recorder
        self.sightings = sightings
        self._handles = handles

    def expect_replicas(self) -> None:
        """Hear of it when nn.DataParallel begins its next forward.

        It is no part of the model, so that takes a hook on all modules; torch.compile warns of
        such, and it is set only where replicas were seen.
        """
        if not any(isinstance(handle, _OfReplicas) for handle in self._handles):
            self._handles.append(_OfReplicas(register_module_forward_pre_hook(_begin_replicas)))

    def __reduce__(self) -> Any:
        """Leave nothing in a copy of the model that is made meanwhile."""
        return type(None), ()


class _OfReplicas(NamedTuple):
    """The hook that waits for replicas."""

    handle: Any

    def remove(self) -> None:
        self.handle.remove()


def listener_of(module: nn.Module) -> Listener | None:
    """Return who listens to a module, or to the one that it is a replica of."""
    return module.__dict__.get(KEY)


def is_listened_to(root: nn.Module) -> bool:
    """Say whether a model, or a part of it, is listened to already."""
    return any(listener_of(module) is not None for module in root.modules())


@contextmanager
def listening(root: nn.Module, recorder: Recorder, sightings: Sightings) -> Iterator[None]:
    """Let a recorder hear of forwards, of tokens that enter blocks, and of attention."""
    handles: list[Any] = []
    modules = list(root.modules())
    try:
        for module in modules:
            module.__dict__[KEY] = Listener(module, recorder, sightings, handles)
        # A wrapper may call the model's `forward` past its hooks, and the model that of its base.
        parts = [module for module in modules if isinstance(module, PreTrainedModel)]
        for module in dict.fromkeys((root, *parts, *(part.base_model for part in parts))):
            handles.append(module.register_forward_pre_hook(_begin_model))
            handles.append(module.register_forward_hook(_note_model))
        for module in sightings.candidates:
            handles.append(module.register_forward_hook(_note_attention))
        for module in dict.fromkeys(recorder.watched_inputs()):
            handles.append(module.register_forward_pre_hook(_observe_input, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            module.__dict__.pop(KEY, None)


@torch.compiler.disable
def _begin_model(module: nn.Module, args: Any) -> None:
    listener = listener_of(module)
    if listener is not None:
        listener.recorder.begin_forward()


@torch.compiler.disable
def _note_model(module: nn.Module, args: Any, output: Any) -> None:
    listener = listener_of(module)
    if listener is not None:
        listener.sightings.ran_model = True


@torch.compiler.disable
def _note_attention(module: nn.Module, args: Any, output: Any) -> None:
    listener = listener_of(module)
    if listener is not None:
        listener.sightings.note_run(listener.module)


@torch.compiler.disable
def _observe_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    listener = listener_of(module)
    if listener is None:
        return
    tokens = args[0] if args else kwargs.get("hidden_states")
    if listener.module is not module:
        listener.expect_replicas()
    if isinstance(tokens, Tensor):
        listener.recorder.observe_input(
            listener.module, tokens, is_replica=listener.module is not module
        )


@torch.compiler.disable
def _begin_replicas(module: nn.Module, args: Any) -> None:
    """Take what the replicas of the last forward showed as one, before the next one runs."""
    if isinstance(module, nn.DataParallel):
        listener = listener_of(next(module.children()))
        if listener is not None:
            listener.recorder.finish_replicas()

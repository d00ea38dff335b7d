"""Registering with transformers in time, without importing it for that.

`import hf_stable` is enough for `TrainingArguments(optim="adamw2")` and for everything else that it
changes in transformers, whichever of the two is imported first. It costs next to nothing in a
process that uses neither. So the changes are made at once where transformers' modules that they
concern are there already, and otherwise as soon as somebody has imported the first of them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_in_time"]

CONCERNED = (
    "transformers.training_args",
    "transformers.trainer_optimizer",
    "transformers.modeling_utils",
    "transformers.models.auto.configuration_auto",
)
"""Modules that something is changed in, or that come with each of those."""

ROOTS = ("accelerate", "hf_stable", "peft", "transformers")
"""Packages that are imported to make the changes, and so must not be in the middle of an import."""


_registering = threading.Lock()


def register_in_time() -> None:
    """Make the changes now if a module that they concern is there, else right after its import.

    Raises:
        ImportError: if transformers is not of a version that fits.
    """
    sys.meta_path.insert(0, _Watcher())
    _register_if_due()


def _register_if_due() -> None:
    # Registering imports modules that are watched too, and a thread that waited for another one
    # here would hold the lock of a module that the other one imports: neither waits.
    if not any(name in sys.modules for name in CONCERNED) or not _registering.acquire(False):
        return
    try:
        if any(isinstance(finder, _Watcher) for finder in sys.meta_path):
            from hf_stable.trainer.plugin import register

            register()
            others = [each for each in sys.meta_path if not isinstance(each, _Watcher)]
            sys.meta_path[:] = others
    finally:
        _registering.release()


class _Watcher:
    """Finds what others find, and looks after the import of each module of `ROOTS`."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders have for a module of `ROOTS`, watched."""
        if fullname.partition(".")[0] not in ROOTS:
            return None
        others = [each for each in sys.meta_path if each is not self and hasattr(each, "find_spec")]
        for finder in others:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Any) -> None:
        # Set on the loader itself, which others ask for sources and data: it stays what it is.
        execute = getattr(loader, "exec_module", None)
        if execute is None or isinstance(loader, type) or "exec_module" in vars(loader):
            return

        def execute_and_look(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            self._run(execute, module)

        loader.exec_module = execute_and_look

    def _run(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Execute a module; register once no module of `ROOTS` is being executed any more.

        In the middle of an import the names that registering needs may not be there yet.
        """
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        try:
            execute(module)
        finally:
            self._thread.depth = depth
        if depth == 0:
            _register_if_due()

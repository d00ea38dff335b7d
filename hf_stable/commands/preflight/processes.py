"""The processes of legs: each a start of the user's own script, in the folder of the leg.

A process that starts from nothing imports torch and transformers first, which takes longer than a
short leg. So legs of one process are forked from a server that has imported them, and does nothing
else. A leg behind a launcher is started by it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from hf_stable._json import to_json
from hf_stable.commands.preflight.legs import Leg, Settings, begin_leg, read_ending

__all__ = ["LegFailed", "can_fork", "run_process"]

PATIENCE = 0.2
"""Seconds after which a waiting thread looks whether it is to stop."""

TAIL = 30
"""Lines of a failed leg's output that its error quotes."""

_main_module = threading.Lock()

Wait = Callable[[float], int | None]
"""Waits for a process for at most so many seconds; returns its exit code, or None if it goes on."""


class LegFailed(ValueError):  # noqa: N818  # "failed" says it
    """A leg ended in an error that is not the loss's: out of memory, an error of the script.

    Attributes:
        output: the end of what the leg printed, or "".
    """

    def __init__(self, message: str, output: str = "") -> None:
        """Keep the output apart from the message, which is one sentence."""
        super().__init__(message)
        self.output = output


def can_fork(settings: Settings) -> bool:
    """Say whether legs can be forked from a server.

    Not behind a launcher, nor where there is an accelerator: importing transformers may have asked
    its driver something, after which a forked process can no longer use it.
    """
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    return has_server and not settings.launcher and not torch.accelerator.is_available()


def run_process(
    settings: Settings, *, forks: bool | None = None
) -> Callable[[Leg, Path, threading.Event], None]:
    """Return what runs a leg as one more start of the user's own script.

    What it prints goes to `output.log` in the leg's folder.

    Args:
        settings: of the legs.
        forks: whether to fork legs from a server; by default where that is possible.
    """
    start = _fork if (can_fork(settings) if forks is None else forks) else _start

    def run(leg: Leg, folder: Path, stopped: threading.Event) -> None:
        begin_leg(folder)
        order = {
            "remedy": leg.remedy.name,
            "factor": leg.factor,
            "seed": leg.seed,
            "settings": asdict(settings),
            "folder": str(folder.resolve()),
        }
        log = folder / "output.log"
        pid, wait = start(settings, to_json(order), log)
        code = _wait_for(pid, wait, stopped)
        if read_ending(folder, leg.key(settings)) is None:
            raise _failure(leg, settings, log, code)

    return run


def _start(settings: Settings, order: str, log: Path) -> tuple[int, Wait]:
    """Start a leg by its launcher, or by this Python."""
    launcher = settings.launcher or (sys.executable,)
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*launcher, "-m", "hf_stable.commands.preflight", order],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
    except OSError as error:
        raise LegFailed(
            f"cannot start {launcher[0]!r}: {error.strerror}; --launcher takes the words "
            'before "-m", such as "torchrun --nproc-per-node 8"'
        ) from error

    def wait(seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        return None

    return process.pid, wait


def _fork(settings: Settings, order: str, log: Path) -> tuple[int, Wait]:
    """Fork a leg from the server, which the first leg starts."""
    from hf_stable.commands.preflight import child  # puts its changes on the list

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([child.__name__])
    process = context.Process(target=child.run_apart, args=(order, str(log.resolve())))
    with _without_main():
        process.start()
    assert process.pid is not None

    def wait(seconds: float) -> int | None:
        process.join(seconds)
        return process.exitcode

    return process.pid, wait


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main module from multiprocessing, which would run it once more in each leg.

    A program of the user's that calls the command need not have a guard against that.
    """
    with _main_module:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _wait_for(pid: int, wait: Wait, stopped: threading.Event) -> int:
    """Wait for a leg; an interrupt, or another leg's failure, ends it with all that it started."""
    try:
        while not stopped.is_set():
            if (code := wait(PATIENCE)) is not None:
                return code
        raise KeyboardInterrupt
    except BaseException:
        _signal(pid, signal.SIGTERM)
        if wait(10) is None:
            _signal(pid, signal.SIGKILL)
            wait(10)
        raise


def _signal(pid: int, number: int) -> None:
    """Send a signal to a leg's session, or to the leg alone if it has not begun one yet."""
    with contextlib.suppress(ProcessLookupError):
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            os.kill(pid, number)


def _failure(leg: Leg, settings: Settings, log: Path, code: int) -> LegFailed:
    what = " ".join(settings.command[:2] if settings.command[0] == "-m" else settings.command[:1])
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return LegFailed(
            f"the process of the leg {leg.name!r} ended with code {code} before it began {what}; "
            "what it printed is above"
        )
    if code == 0:
        return LegFailed(
            f"{what} ended without training a transformers Trainer, so there is nothing to judge; "
            f"its output is in {log}"
        )
    return LegFailed(
        f"{what} ended with code {code} in the leg {leg.name!r}, for a reason that says nothing "
        f"about its rate; its output is in {log}",
        "\n".join(lines[-TAIL:]),
    )

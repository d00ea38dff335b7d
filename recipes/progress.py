"""How far a run is, said where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback

__all__ = ["SaysHowFarItIs"]


PAUSE = 300.0
"""Seconds between lines that say how far a run is, where there is no terminal for a bar."""


class SaysHowFarItIs(TrainerCallback):
    """Prints a line now and then where no bar shows how far a run is: off a terminal."""

    def __init__(self) -> None:
        """Count from here."""
        self.then, self.step = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        self.then, self.step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how far it is, if it is long enough since the last time."""
        loss, steps = (kwargs.get("logs") or {}).get("loss"), state.global_step - self.step
        seconds = time.perf_counter() - self.then
        shows_bar = not args.disable_tqdm
        if shows_bar or not state.is_world_process_zero or loss is None or steps < 1:
            return
        if seconds >= PAUSE:
            print(
                f"step {state.global_step} of {state.max_steps}, loss {loss:.4g}, "
                f"{seconds / steps:.3g} s a step",
                file=sys.stderr,
                flush=True,
            )
            self.then, self.step = time.perf_counter(), state.global_step

"""One leg of a preflight in a process of its own: `python -m ...preflight`, or forked from one.

The script runs as it is. Its arguments are changed where they come into being, the leg's remedy is
given to the first Trainer that trains, and the process ends where that training does.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from hf_stable.commands.launch.scripts import run_script
from hf_stable.commands.preflight.attaching import LegRefused, prepare, quieten, train_leg
from hf_stable.commands.preflight.legs import Ending, Leg, Settings, write_ending
from hf_stable.commands.preflight.remedies import parse_remedy
from hf_stable.commands.registering import register_from
from hf_stable.trainer.changes import make, wrapping

__all__ = ["PREFLIGHT", "main", "run_apart"]

PREFLIGHT = "hf-stable preflight, in the processes of its legs"


@dataclass(frozen=True)
class Order:
    """What the process is to do."""

    leg: Leg
    settings: Settings
    folder: Path


_order: Order


def main(argv: Sequence[str] | None = None) -> None:
    """Run a leg.

    Args:
        argv: one argument, the JSON of the leg, its settings and its folder.
    """
    global _order
    (text,) = sys.argv[1:] if argv is None else argv
    given = json.loads(text)
    words = {name: tuple(given["settings"][name]) for name in ("command", "launcher", "register")}
    settings = Settings(**(given["settings"] | words))
    leg = Leg(parse_remedy(given["remedy"]), given["factor"], given["seed"])
    _order = Order(leg, settings, Path(given["folder"]))
    register_from(settings.register)
    make(PREFLIGHT)
    run_script(settings.command)


def run_apart(order: str, log: str) -> None:
    """Run a leg in a forked process, as one that was started: in a session and a log of its own.

    Args:
        order: as `main` takes it.
        log: file for what is printed.
    """
    os.setsid()
    os.environ["PYTHONUNBUFFERED"] = "1"
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(write_through=True)  # type: ignore[union-attr]  # no stand-in: see dup2
    gc.freeze()  # what the server imported is nothing to collect
    main([order])


@wrapping(
    "transformers.training_args:TrainingArguments.__post_init__",
    reason="evaluation, saving, pushing and trackers are off, output goes to the leg's folder",
    made_by=PREFLIGHT,
)
def _finish_quietly(finish: Any, args: TrainingArguments) -> None:
    finish(args)
    quieten(args, _order.leg, _order.folder)


@wrapping(
    "transformers.trainer:Trainer.__init__", "args",
    reason="quietens arguments too that were read from a file, or changed since",
    made_by=PREFLIGHT,
)  # fmt: skip
def _build_quietly(
    build: Any, trainer: Trainer, model: Any = None, args: Any = None, *rest: Any, **options: Any
) -> None:
    if args is not None:
        quieten(args, _order.leg, _order.folder)
    build(trainer, model, args, *rest, **options)


@wrapping(
    "transformers.trainer:Trainer.train",
    reason="a training ends after the leg's steps, and the script with it",
    made_by=PREFLIGHT,
)
def _train_and_leave(train: Any, trainer: Trainer, *args: Any, **options: Any) -> Any:
    leg, settings, folder = _order.leg, _order.settings, _order.folder
    try:
        callback = prepare(trainer, leg, settings, folder)
    except LegRefused as reason:
        if trainer.is_world_process_zero():
            write_ending(folder, Ending(leg.key(settings), "refused", str(reason)), leg)
    else:
        train_leg(train, trainer, callback, *args, **options)
    raise SystemExit(0)

"""One leg of a preflight in a process of its own: `python -m hf_stable.commands.preflight.child`.

The script runs as it is. Its arguments are changed where they come into being, the leg's remedy is
given to the first Trainer that trains, and the process ends where that training does.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from hf_stable.commands.launch.scripts import run_script
from hf_stable.commands.preflight.attaching import LegRefused, prepare, quieten, train_leg
from hf_stable.commands.preflight.legs import Ending, Leg, Settings, write_ending
from hf_stable.commands.preflight.remedies import parse_remedy

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a leg.

    Args:
        argv: one argument, the JSON of the leg, its settings and its folder.
    """
    (text,) = sys.argv[1:] if argv is None else argv
    order = json.loads(text)
    leg = Leg(parse_remedy(order["remedy"]), order["factor"], order["seed"])
    given = order["settings"]
    settings = Settings(
        tuple(given["command"]), given["steps"], given["every"], tuple(given["launcher"])
    )
    attach(leg, settings, Path(order["folder"]))
    run_script(settings.command)


def attach(leg: Leg, settings: Settings, folder: Path) -> None:
    """Make this process one leg, from the next TrainingArguments on."""
    finish, build, train = TrainingArguments.__post_init__, Trainer.__init__, Trainer.train

    @functools.wraps(finish)
    def finish_quietly(args: TrainingArguments) -> None:
        finish(args)
        quieten(args, leg, folder)

    @functools.wraps(build)
    def build_quietly(
        trainer: Trainer, model: Any = None, args: Any = None, *rest: Any, **options: Any
    ) -> None:
        if args is not None:
            quieten(args, leg, folder)  # read from a file, perhaps, or changed since
        build(trainer, model, args, *rest, **options)

    @functools.wraps(train)
    def train_and_leave(trainer: Trainer, *args: Any, **options: Any) -> Any:
        try:
            callback = prepare(trainer, leg, settings, folder)
        except LegRefused as reason:
            if trainer.is_world_process_zero():
                write_ending(folder, Ending(leg.key(settings), "refused", str(reason)), leg)
        else:
            train_leg(train, trainer, callback, *args, **options)
        raise SystemExit(0)

    TrainingArguments.__post_init__ = finish_quietly
    Trainer.__init__ = build_quietly
    Trainer.train = train_and_leave


if __name__ == "__main__":
    main()

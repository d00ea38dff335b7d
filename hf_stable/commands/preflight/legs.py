"""The legs of a preflight: one remedy at one multiple of the rate under one seed, and what it left.

A leg has a folder: `leg.json` says what it was and how it ended; `trainer_state.json`,
`config.json` and `stability.jsonl` hold its course as those of any run do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_stable._json import from_json, to_json
from hf_stable._whole_files import write_whole
from hf_stable.commands.preflight.remedies import Remedy
from hf_stable.monitor.log_file import FILE_NAME

__all__ = [
    "CONFIG_FILE",
    "LEG_FILE",
    "Ending",
    "Leg",
    "Settings",
    "begin_leg",
    "read_ending",
    "write_ending",
]

LEG_FILE = "leg.json"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Settings:
    """What holds for every leg.

    Attributes:
        command: the script and its arguments; empty where a function makes the Trainer.
        steps: optimizer steps of a leg.
        every: steps from probe to probe.
        launcher: words before `-m` that start the processes of a leg; empty for one process.
        register: Python files that register architectures, which each leg runs before the script.
    """

    command: tuple[str, ...]
    steps: int
    every: int
    launcher: tuple[str, ...] = ()
    register: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leg:
    """One run of a preflight.

    Attributes:
        remedy: what is changed about the run.
        factor: multiple of the run's own learning rate.
        seed: added to the run's own seed.
    """

    remedy: Remedy
    factor: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Return a label that is also the name of a folder."""
        remedy = "".join(c if c.isalnum() or c in "+=.-" else "_" for c in self.remedy.name)
        seed = f" seed {self.seed}" if self.seed else ""
        return f"{remedy} x{self.factor:.4g}{seed}"

    def key(self, settings: Settings) -> str:
        """Return what changes with everything that the leg's outcome depends on."""
        content = to_json([asdict(settings), asdict(self)], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Ending:
    """How a leg ended, and what was seen of the run on the way.

    Attributes:
        key: of the leg under its settings.
        end: "steps" after as many as were asked for, "training" where the run is shorter,
            "nonfinite" at a loss that is not finite, "refused" where the remedy does not go with
            the script, whose reason is in `reason`.
        reason: a sentence, or "".
        steps: optimizer steps done.
        seconds_per_step: median over the steps that were not probed, without the first.
        facts: of the run as the script plans it: `learning_rate`, `optim`, `warmup_steps`,
            `max_grad_norm`, `max_steps`, `own_optimizer`, `model`; `tau`, which AdamW2's `tau=auto`
            is for it.
    """

    key: str
    end: str
    reason: str = ""
    steps: int = 0
    seconds_per_step: float | None = None
    facts: Mapping[str, Any] | None = None


def write_ending(folder: Path, ending: Ending, leg: Leg) -> None:
    """Write `leg.json` whole or not at all: a leg without one is not done."""
    what = {"name": leg.name, "remedy": leg.remedy.name, "factor": leg.factor, "seed": leg.seed}
    with write_whole(folder / LEG_FILE) as file:
        file.write(to_json({"leg": what, "ending": asdict(ending)}, indent=1) + "\n")


def begin_leg(folder: Path) -> None:
    """Make a leg's folder, without the records of a leg that was cut short or of another model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (FILE_NAME, CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)


def read_ending(folder: Path, key: str | None = None) -> Ending | None:
    """Return how the leg in a folder ended; None if it did not, or was another leg than `key`."""
    try:
        content = from_json((folder / LEG_FILE).read_text(encoding="utf-8"))["ending"]
        ending = Ending(**content)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # no leg was done here that can be built on: it is run again
    return ending if key is None or ending.key == key else None

"""A whole preflight: check what is asked for, run the legs, conclude, write it down."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.training_args import OptimizerNames

from hf_stable._json import from_json, to_json
from hf_stable._whole_files import write_whole
from hf_stable._wording import nearest
from hf_stable.commands.preflight.attaching import LegRefused, prepare, train_leg
from hf_stable.commands.preflight.judging import Outcome
from hf_stable.commands.preflight.legs import Ending, Leg, Settings, begin_leg, write_ending
from hf_stable.commands.preflight.processes import run_process
from hf_stable.commands.preflight.remedies import parse_remedies
from hf_stable.commands.preflight.result import PreflightResult, conclude
from hf_stable.commands.preflight.running import Plan, Runner, run_legs
from hf_stable.measures.loss_curves import FEWEST
from hf_stable.monitor.folder_lock import FolderLock

__all__ = ["DEFAULT_RATES", "DEFAULT_REMEDIES", "RESULT_FILE", "fly", "preflight"]

DEFAULT_RATES = (0.3, 1.0, 3.0, 10.0)
DEFAULT_REMEDIES = "none,warmup,clip,adamw2,sigma_reparam,adamw2+sigma_reparam"
RESULT_FILE = "preflight.json"
PROBES = 20
"""Probes over a leg."""


def preflight(
    make_trainer: Callable[[], Trainer],
    *,
    rates: Sequence[float] = DEFAULT_RATES,
    remedies: str | Sequence[str] = DEFAULT_REMEDIES,
    steps: int = 100,
    seeds: int = 1,
    bisect: bool = False,
    skip: bool = True,
    output: str | os.PathLike[str] = "preflight-output",
    on_leg: Callable[[Outcome], None] = lambda outcome: None,
) -> PreflightResult:
    """Find out, before a run, which learning rates it survives and which remedy it needs.

    Trains the first steps of the run once for each pair of remedy and rate, in this process, one
    after another. The schedule stays that of the whole run; evaluation, saving, pushing and
    trackers are off. Legs that `output` holds already, under the same settings, are not run again.

    Args:
        make_trainer: returns a fresh Trainer, which has not trained, with a fresh model; the same
            at every call, seeds included.
        rates: multiples of the run's own learning rate; 1 is always among them.
        remedies: as on the command line: "none", "warmup", "clip", "adamw2", "sigma_reparam", ...,
            joined with "+", with options behind ":".
        steps: optimizer steps of each leg.
        seeds: how many seeds to take each leg under: the Trainer's own, one more, and so on.
        bisect: narrow the highest rate that survives down to within a factor of 1.5.
        skip: leave out rates above one at which the same remedy lost its loss.
        output: folder for the legs and `preflight.json`.
        on_leg: called with each `Outcome` as it is known.

    Returns:
        The result; `result.passed` says whether the planned rate has a margin of two or more.

    Raises:
        ValueError: for a rate, a remedy or a number of steps that is not allowed, or a folder of
            another preflight.
        Exception: whatever a leg raises that is not the loss's doing.
    """
    text = remedies if isinstance(remedies, str) else ",".join(remedies)
    name = getattr(make_trainer, "__qualname__", type(make_trainer).__qualname__)
    plan = Plan(tuple(map(float, rates)), parse_remedies(text), seeds, bisect, skip)
    settings = Settings((), steps, max(1, steps // PROBES))
    run = _run_here(make_trainer, settings)
    return fly(plan, settings, Path(output), run, identity=[name], on_leg=on_leg)


def fly(
    plan: Plan,
    settings: Settings,
    output: Path,
    run: Runner | None = None,
    *,
    identity: Sequence[str] = (),
    jobs: int = 1,
    on_leg: Callable[[Outcome], None] = lambda outcome: None,
) -> PreflightResult:
    """Run a preflight and write `preflight.json`.

    Args:
        plan: what to try.
        settings: of each leg.
        output: folder; one that holds this preflight is gone on with.
        run: runs a leg; by default as a process of the settings' command.
        identity: what tells this preflight from another one; by default the command.
        jobs: legs at once.
        on_leg: called with each outcome.

    Raises:
        ValueError: for values that are not allowed, or a folder of another preflight, or of one
            that is running.
        LegFailed: if a leg ends for a reason of its own.
    """
    _check(plan, settings, jobs)
    _claim(output, list(identity or settings.command))
    lock = FolderLock(output)
    if holder := lock.acquire():
        raise ValueError(
            f"a preflight runs in {output} already ({holder}); wait for it, or give another folder"
        )
    try:
        outcomes = run_legs(
            plan, settings, output, run or run_process(settings), jobs=jobs, on_leg=on_leg
        )
        result = conclude(outcomes, settings)
        _write(output / RESULT_FILE, result.to_dict())
    finally:
        lock.release()
    return result


def _check(plan: Plan, settings: Settings, jobs: int) -> None:
    for rate in plan.rates:
        if not 0 < rate < float("inf"):
            raise ValueError(f"a rate is a positive multiple of the script's own, got {rate!r}")
    optimizers = [each.value for each in OptimizerNames]
    for remedy in plan.remedies:
        if remedy.optim is not None and remedy.optim not in optimizers:
            raise ValueError(
                f"remedy {remedy.name!r} names no optimizer of TrainingArguments"
                f"{nearest(remedy.optim, optimizers)}; they are {', '.join(optimizers)}"
            )
    for name, value in (("seeds", plan.seeds), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} is a number from 1 on, got {value!r}")
    if settings.steps < FEWEST:
        raise ValueError(
            f"{settings.steps} steps are too few: a loss can be judged from {FEWEST} on, and "
            "the monitor has to have probed several times"
        )


def _claim(output: Path, identity: list[str]) -> None:
    """Make a folder this preflight's, unless it is another's."""
    path = output / "preflight-of.json"
    if path.is_file():
        try:
            known = from_json(path.read_text(encoding="utf-8"))
        except ValueError:
            known = None
        if known != identity:
            whose = " ".join(map(str, known)) if isinstance(known, list) else "something else"
            raise ValueError(
                f"{output} holds the preflight of {whose!r}; give another folder for this one"
            )
        return
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no preflight; give another folder")
    output.mkdir(parents=True, exist_ok=True)
    _write(path, identity)


def _write(path: Path, content: Any) -> None:
    with write_whole(path) as file:
        file.write(to_json(content, indent=1) + "\n")


def _run_here(make_trainer: Callable[[], Trainer], settings: Settings) -> Runner:
    def run(leg: Leg, folder: Path, stopped: threading.Event) -> None:
        begin_leg(folder)
        trainer = make_trainer()
        if trainer.state.global_step or trainer.optimizer is not None and trainer.state.log_history:
            raise ValueError(
                "make_trainer returned a Trainer that has trained: it has to build a fresh model "
                "and a fresh Trainer at every call"
            )
        try:
            callback = prepare(trainer, leg, settings, folder)
        except LegRefused as reason:
            write_ending(folder, Ending(leg.key(settings), "refused", str(reason)), leg)
            return
        train_leg(type(trainer).train, trainer, callback)

    return run

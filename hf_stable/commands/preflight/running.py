"""Which legs of a preflight are run, in which order, and in which processes.

The run as planned comes first: what it is decides which remedies make sense. Then each remedy under
each seed is a chain of rates from below; where a leg of it is lost, the rates above are not run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_stable._json import to_json
from hf_stable.commands.preflight.judging import Outcome, judge_leg
from hf_stable.commands.preflight.legs import Leg, Settings, read_ending
from hf_stable.commands.preflight.remedies import NONE, Remedy

__all__ = ["LegFailed", "Plan", "Runner", "run_legs", "run_process"]

FINEST = 1.5
"""A bisection ends where the rate that is lost is at most this many times one that is not."""

PATIENCE = 0.2
"""Seconds after which a waiting thread looks whether it is to stop."""

TAIL = 30
"""Lines of a failed leg's output that its error quotes."""


class LegFailed(ValueError):  # noqa: N818  # "failed" says it
    """A leg ended in an error that is not the loss's: out of memory, an error of the script.

    Attributes:
        output: the end of what the leg printed, or "".
    """

    def __init__(self, message: str, output: str = "") -> None:
        """Keep the output apart from the message, which is one sentence."""
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Plan:
    """What a preflight tries.

    Attributes:
        rates: multiples of the run's own rate; 1 is always among those that are run.
        remedies: to be tried beside the run as it is.
        seeds: how many.
        bisect: whether to narrow the highest rate that survives down to a factor of 1.5.
        skip: leave out rates above one at which the same remedy was lost.
    """

    rates: tuple[float, ...]
    remedies: tuple[Remedy, ...]
    seeds: int = 1
    bisect: bool = False
    skip: bool = True


Runner = Callable[[Leg, Path, threading.Event], None]
"""Runs a leg so that `leg.json` is in the folder afterwards, or raises `LegFailed`; ends early once
the event is set."""


def run_legs(
    plan: Plan,
    settings: Settings,
    folder: Path,
    run: Runner,
    *,
    jobs: int = 1,
    on_leg: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run what is not done yet and judge every leg.

    Args:
        plan: what to try.
        settings: of every leg.
        folder: of the preflight; a leg's is `legs/NAME` in it.
        run: does one leg.
        jobs: how many at once.
        on_leg: called, from any thread, with each outcome as it is known.

    Returns:
        Outcomes in the order of remedies, seeds, rates; legs that were left out are among them.

    Raises:
        LegFailed: if a leg ends in an error of its own. The legs that are done stay done.
    """
    stopped = threading.Event()

    def do(leg: Leg) -> Outcome:
        if stopped.is_set():
            raise KeyboardInterrupt
        own = folder / "legs" / leg.name
        if read_ending(own, leg.key(settings)) is None:
            run(leg, own, stopped)
        outcome = judge_leg(leg, own, settings)
        on_leg(outcome)
        return outcome

    planned = do(Leg(NONE, 1.0))
    remedies = (NONE, *(remedy for remedy in plan.remedies if remedy != NONE))
    rates = tuple(sorted({1.0, *plan.rates}))
    chains = [(remedy, seed) for remedy in remedies for seed in range(plan.seeds)]

    def chain(remedy: Remedy, seed: int) -> list[Outcome]:
        known = {1.0: planned} if (remedy, seed) == (NONE, 0) else {}
        return _run_chain(plan, rates, remedy, seed, known, do, on_leg)

    pool = ThreadPoolExecutor(max_workers=jobs)
    try:
        futures = [pool.submit(chain, *each) for each in chains]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done() and not future.cancelled() and (error := future.exception()):
                raise error
        return [outcome for future in futures for outcome in future.result()]
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _run_chain(
    plan: Plan,
    rates: Sequence[float],
    remedy: Remedy,
    seed: int,
    known: dict[float, Outcome],
    do: Callable[[Leg], Outcome],
    on_leg: Callable[[Outcome], None],
) -> list[Outcome]:
    lost: float | None = None
    for factor in rates:
        leg = Leg(remedy, factor, seed)
        if factor in known:
            outcome = known[factor]
        elif lost is not None and plan.skip:
            outcome = Outcome.skipped(leg, f"not run: it was lost at {lost:g} times the rate")
            on_leg(outcome)
        else:
            outcome = do(leg)
        known[factor] = outcome
        if outcome.is_lost and lost is None:
            lost = factor
        if outcome.kind == "refused":
            break  # the reason holds at every rate
    if plan.bisect:
        _bisect(remedy, seed, known, do)
    return [known[factor] for factor in sorted(known)]


def _bisect(
    remedy: Remedy, seed: int, known: dict[float, Outcome], do: Callable[[Leg], Outcome]
) -> None:
    """Add legs between the highest rate that survives and the lowest above it that does not."""
    while True:
        bad = [f for f, outcome in known.items() if outcome.is_run and not outcome.survives]
        first_bad = min(bad, default=None)
        good = [f for f, o in known.items() if o.survives and (first_bad is None or f < first_bad)]
        if first_bad is None or not good or first_bad / max(good) <= FINEST:
            return
        middle = float(f"{(first_bad * max(good)) ** 0.5:.3g}")
        known[middle] = do(Leg(remedy, middle, seed))


def run_process(settings: Settings) -> Runner:
    """Return what runs a leg as one more start of the user's own script.

    What it prints goes to `output.log` in the leg's folder.
    """

    def run(leg: Leg, folder: Path, stopped: threading.Event) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stability.jsonl").unlink(missing_ok=True)  # of a leg that was cut short
        order = {
            "remedy": leg.remedy.name,
            "factor": leg.factor,
            "seed": leg.seed,
            "settings": asdict(settings),
            "folder": str(folder.resolve()),
        }
        launcher = settings.launcher or (sys.executable,)
        command = [*launcher, "-m", "hf_stable.commands.preflight", to_json(order)]
        log = folder / "output.log"
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command,
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
            code = _wait_for(process, stopped)
        if read_ending(folder, leg.key(settings)) is None:
            raise _failure(leg, settings, log, code)

    return run


def _wait_for(process: subprocess.Popen[bytes], stopped: threading.Event) -> int:
    """Wait for a leg; an interrupt, or another leg's failure, ends it with all that it started."""
    try:
        while not stopped.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(PATIENCE)
        raise KeyboardInterrupt
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def _failure(leg: Leg, settings: Settings, log: Path, code: int) -> LegFailed:
    what = " ".join(settings.command[:2] if settings.command[0] == "-m" else settings.command[:1])
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
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

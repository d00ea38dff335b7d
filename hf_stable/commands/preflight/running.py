"""Which legs of a preflight are run, and in which order.

The run as planned comes first: what it is decides which remedies make sense. Then each remedy under
each seed is a chain of rates from below; where a leg of it is lost, the rates above are not run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from hf_stable.commands.preflight.judging import Outcome, judge_leg
from hf_stable.commands.preflight.legs import Leg, Settings, read_ending
from hf_stable.commands.preflight.remedies import NONE, Remedy

__all__ = ["Plan", "Runner", "run_legs"]

FINEST = 1.5
"""A bisection ends where the rate that is lost is at most this many times one that is not."""


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
        return _results([pool.submit(chain, *each) for each in chains])
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _results(futures: Sequence[Future[list[Outcome]]]) -> list[Outcome]:
    """Return what chains come to, or raise the first error without waiting for the others."""
    wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future.done() and not future.cancelled() and (error := future.exception()):
            raise error
    return [outcome for future in futures for outcome in future.result()]


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

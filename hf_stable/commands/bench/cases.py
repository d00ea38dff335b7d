"""What the benchmarks have in common: their options, and how their cases are run and reported."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypedDict

import torch
from rich.console import Console

from hf_stable.commands.bench.timing import (
    PhaseClock,
    Samples,
    Summary,
    alternate,
    print_summaries,
    summarise,
    write_results,
)

__all__ = ["Case", "NewClock", "Options", "Subject", "run_cases"]

Subject = Callable[[], Mapping[str, float]]
"""Does one repetition and returns the seconds of its phases."""

NewClock = Callable[[], PhaseClock]
"""Starts a stopwatch for one repetition."""

SECONDS = 20.0
"""About how long one case may take, unless an option says otherwise."""


class Options(TypedDict, total=False):
    """How a benchmark is run.

    Attributes:
        output: JSON file to write.
        rounds: most repetitions of every subject of every case, alternated.
        device: where to run.
        only: run the cases whose name contains this text.
        seconds: about how long one case may take; at least five rounds are run.
        threads: run every case on so many; by default on one, and on all of torch's.
        cpu_time: count the processor time of this process, not the time on the clock: what the
            work costs while other programs use the machine. It says little with several threads,
            which wait for each other by spinning.
        console: where to print.
    """

    output: str | os.PathLike[str] | None
    rounds: int
    device: torch.device | str
    only: str
    seconds: float
    threads: int | None
    cpu_time: bool
    console: Console | None


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: to which the number of threads is added.
        prepare: builds the subjects, which exist while their case runs.
    """

    name: str
    prepare: Callable[[NewClock], Mapping[str, Subject]]


def run_cases(
    name: str,
    cases: Iterable[Case],
    baseline: str,
    options: Options,
    *,
    rounds: int,
    about: Mapping[str, Any],
    derive: Callable[[Samples], Samples] = lambda samples: samples,
    measure_more: Callable[[Console], dict[str, Any]] = lambda console: {},
) -> list[Summary]:
    """Run the cases of a benchmark, print a table, and write JSON where the options say so.

    Args:
        name: of the benchmark.
        cases: in their order.
        baseline: the subject that ratios are taken to.
        options: how it is run.
        rounds: how many, unless an option says so.
        about: what else the JSON file says of the settings.
        derive: adds subjects that follow from the others.
        measure_more: measures and prints what has no seconds, and returns it for the file; not
            called where cases were chosen.

    Returns:
        The summaries that were printed, one per case, subject and phase.

    Raises:
        ValueError: if `only` matches no case, or `rounds` is less than 1.
        OSError: if the file cannot be written.
    """
    device, only = torch.device(options.get("device", "cpu")), options.get("only", "")
    rounds, cpu_time = options.get("rounds", rounds), options.get("cpu_time", False)
    console = options.get("console") or Console()
    new_clock = partial(PhaseClock, device, time.process_time if cpu_time else time.perf_counter)
    summaries: list[Summary] = []
    names = []
    for case in cases:
        for count in _counts(options, device):
            names.append(f"{case.name}, {count} thread{'s' if count > 1 else ''}")
            if only not in names[-1]:
                continue
            with _threads(count):
                seconds = options.get("seconds", SECONDS)
                samples = alternate(case.prepare(new_clock), rounds=rounds, seconds=seconds)
                summaries += summarise(names[-1], derive(samples), baseline)
    if not summaries:
        raise ValueError(f"no case has {only!r} in its name; the cases are {'; '.join(names)}")
    timer = "processor time" if cpu_time else "time on the clock"
    print_summaries(f"bench {name}: {timer}, ratio to {baseline}", summaries, console)
    more = {} if only else measure_more(console)
    if options.get("output") is not None:
        settings = {"benchmark": name, "baseline": baseline, "timer": timer, "only": only}
        content = {"settings": settings | dict(about) | more}
        write_results(options["output"] or "", map(asdict, summaries), content, device)
    return summaries


def _counts(options: Options, device: torch.device) -> list[int]:
    """Return the numbers of threads that every case is run on."""
    given = options.get("threads")
    if given is not None:
        return [given]
    every = torch.get_num_threads()
    return sorted({1, every}) if device.type == "cpu" else [every]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Timing by alternation: A, B, A, B ... in one process, medians, ratios taken round by round.

Shared by the benchmarks of the methods. A machine that is busy with something else slows both
sides of a round alike, so a ratio within a round says more than a ratio of two runs. Nothing here
knows a model or a method.
"""

from __future__ import annotations

import os
import platform
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stable._json import to_json
from hf_stable.commands.terminal import make_console, make_table

__all__ = [
    "TOTAL",
    "PeakBytes",
    "PhaseClock",
    "Samples",
    "Summary",
    "alternate",
    "describe_machine",
    "print_summaries",
    "summarise",
    "write_results",
]

TOTAL = "total"
"""The phase that sums up all others of a repetition."""

FEWEST_ROUNDS = 5
"""A median of fewer rounds is none; a limit in seconds does not go below them."""

Samples = dict[str, dict[str, list[float]]]
"""Seconds of each round, by subject and phase."""


class PhaseClock:
    """A stopwatch for one repetition that consists of phases.

    Args:
        device: waited for at the end of each phase, where it runs asynchronously.
        timer: function that returns seconds. `time.process_time` leaves out the time that other
            programs took; with one thread that is the cost of the work on a busy machine.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the first phase."""
        self.device = torch.device(device)
        self.timer = timer
        self.seconds: dict[str, float] = {}
        self._start = self._now()

    def lap(self, phase: str) -> None:
        """End the running phase under this name and begin the next one."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._start
        self._start = now

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return self.timer()


def alternate(
    subjects: Mapping[str, Callable[[], Mapping[str, float]]],
    *,
    rounds: int,
    warmup: int = 2,
    seconds: float = float("inf"),
) -> Samples:
    """Run every subject once per round and collect the seconds of its phases.

    Every other round runs backwards, so that no subject always follows the same other one.

    Args:
        subjects: functions that do one repetition and return the seconds of its phases
            (`PhaseClock.seconds`). Naming the same work twice gives the noise of the machine.
        rounds: number of measured rounds, at least 1.
        warmup: rounds before them that are not kept.
        seconds: after this long no further round begins once `FEWEST_ROUNDS` are measured.

    Returns:
        Seconds by subject and phase, one value per round. The phase `TOTAL` is the sum of the
        phases of a repetition.

    Raises:
        ValueError: if `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} measures nothing; give at least 1")
    samples: Samples = {name: {} for name in subjects}
    start = time.monotonic()
    for round_number in range(-warmup, rounds):
        if round_number >= FEWEST_ROUNDS and time.monotonic() - start > seconds:
            break
        order = list(subjects) if round_number % 2 else list(subjects)[::-1]
        for name in order:
            phases = subjects[name]()
            if round_number < 0:
                continue
            for phase, taken in {**phases, TOTAL: sum(phases.values())}.items():
                samples[name].setdefault(phase, []).append(taken)
    return samples


@dataclass(frozen=True)
class Summary:
    """One phase of one subject in one case.

    Attributes:
        case: what was run, e.g. `"vit step, batch 2"`.
        subject: which variant ran it.
        phase: part of the repetition, `TOTAL` for all of it.
        milliseconds: median over the rounds.
        ratio: median over the rounds of (this subject) / (baseline) in the same round; None where
            the baseline has no such phase.
        ratio_quartiles: first and third quartile of the same ratios.
        rounds: number of rounds.
    """

    case: str
    subject: str
    phase: str
    milliseconds: float
    ratio: float | None
    ratio_quartiles: tuple[float, float] | None
    rounds: int


def summarise(case: str, samples: Samples, baseline: str) -> list[Summary]:
    """Reduce samples to medians and ratios against one of the subjects.

    Raises:
        ValueError: if `baseline` is not one of the subjects.
    """
    if baseline not in samples:
        raise ValueError(f"baseline {baseline!r} was not measured; choose from {list(samples)}")
    summaries = []
    for subject, phases in samples.items():
        for phase, seconds in phases.items():
            ratio, quartiles = None, None
            reference = samples[baseline].get(phase)
            if reference is not None:
                ratios = [s / r for s, r in zip(seconds, reference, strict=True)]
                ratio = median(ratios)
                low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else [ratio] * 3
                quartiles = (low, high)
            milliseconds = 1e3 * median(seconds)
            summaries.append(
                Summary(case, subject, phase, milliseconds, ratio, quartiles, len(seconds))
            )
    return summaries


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what a reader needs to judge a timing: processor, cores, threads, load, versions."""
    device = torch.device(device)
    names = ("torch", "transformers", "numba", "triton")
    versions = {name: version(name) for name in names if find_spec(name) is not None}
    return {
        "processor": _processor_name() if device.type == "cpu" else _accelerator_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        # Programs that wanted a core in the last minute, this one among them.
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": versions | {"python": platform.python_version()},
    }


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _accelerator_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def print_summaries(
    title: str, summaries: Iterable[Summary], console: Console | None = None
) -> None:
    """Print a table with one row per case, subject and phase."""
    table = make_table("case", "subject", "phase", "ms", "ratio", "quartiles")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in summaries:
        quartiles = "{:.3f} {:.3f}".format(*row.ratio_quartiles) if row.ratio_quartiles else ""
        ratio = f"{row.ratio:.3f}" if row.ratio is not None else ""
        table.add_row(
            row.case, row.subject, row.phase, f"{row.milliseconds:.2f}", ratio, quartiles,
            end_section=row.phase == TOTAL,
        )  # fmt: skip
    (console or make_console()).print(title, table, sep="\n")


def write_results(
    path: str | os.PathLike[str],
    results: Iterable[Mapping[str, Any]],
    about: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> None:
    """Write the machine, what there is to know about a measurement, and its results to JSON.

    Raises:
        OSError: if the file cannot be written.
    """
    content = {"machine": describe_machine(device), **about, "results": list(results)}
    Path(path).write_text(to_json(content, indent=2) + "\n")


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are created inside and still alive."""

    def __init__(self) -> None:
        """Start at nothing."""
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then note the storages that are new."""
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

"""What a claim is: a sentence, the runs that test it, the rule that judges their results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from recipes.evidence.runs import Variant
from recipes.settings import Settings

Results = Mapping[str, Sequence[Mapping[str, Any]]]
Verdict = tuple[str, str]
"""reproduced, partly, refuted or not at this scale; and a sentence with the numbers."""

WORSE = 1.05
"""A loss beyond this times another is worse than it."""

FAILED_SHARE, BARELY = 0.7, 0.97
"""A run failed if it kept more than this share of the loss of someone who knows only how frequent
the labels are; next tokens of text are worth little more in so few steps, so there it is 0.97."""

ROWS_SPARSE = 0.5
"""Share of its largest value below which entropy counts as fallen."""


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        key: its name on the command line.
        text: what is claimed, and where.
        variants: the runs; shared ones are done once.
        judge: from results to a verdict.
        seeds: how many, at least.
        quick: a few of the variants that show the sign in seconds.
    """

    key: str
    text: str
    variants: tuple[Variant, ...]
    judge: Callable[[Results], Verdict]
    seeds: int = 3
    quick: tuple[str, ...] = ()


def losses(results: Results, name: str) -> list[float]:
    """Return the test losses of a variant; infinite where a run ended in NaN."""
    return [math.inf if r["test_loss"] is None else r["test_loss"] for r in results[name]]


def failures(results: Results, name: str) -> int:
    """Return how many runs of a variant learnt next to nothing."""
    shares = [BARELY if r["settings"]["model"] == "gpt2" else FAILED_SHARE for r in results[name]]
    runs = zip(losses(results, name), shares, results[name], strict=True)
    return sum(loss > share * run["reference"] for loss, share, run in runs)


def text_of(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and standard deviation."""
    if any(not math.isfinite(v) for v in values):
        return "NaN"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def of(settings: Mapping[str, Settings]) -> tuple[Variant, ...]:
    """Return settings by name as variants."""
    return tuple(Variant(name, each) for name, each in settings.items())

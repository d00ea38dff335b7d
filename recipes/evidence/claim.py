"""What a claim is: a sentence, the runs that test it, the rule that judges their results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from hf_stable.measures.loss_curves import smooth
from recipes.evidence.runs import Variant
from recipes.models import DECODERS
from recipes.settings import Settings

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""By variant, what is committed of each run: see `records.summary`."""


class Verdict(NamedTuple):
    """What the runs of a claim say.

    Attributes:
        word: of `VERDICTS`.
        sentence: the result in one short sentence, for the table of all claims.
        findings: the numbers behind it, a sentence or two each.
    """

    word: str
    sentence: str
    findings: tuple[str, ...]


VERDICTS = {
    "reproduced": "every part of the claim shows, in every set-up that tests it",
    "partly": "some parts of it show, or in some of the set-ups; the findings say which",
    "not at this scale": "it shows in none of the set-ups, and neither does its opposite",
    "refuted": "its opposite shows in every set-up that tests it",
    "measured": "there is no claim, only numbers",
    "we win": "one of ours is best, by more than 5 %, at every rate and over the rates",
    "mixed": "one of ours is best somewhere; the findings say where we lose",
    "we lose": "none of ours is best at any rate",
}
"""The words of verdicts and what they mean."""

SHOWN = ("reproduced", "partly")
"""Those that say that a claim shows."""

WORSE = 1.05
"""A loss beyond this times another is worse than it."""

FAILED_SHARE, BARELY = 0.7, 0.97
"""A run failed if it kept more than this share of the loss of someone who knows only how frequent
the labels are; next tokens of text are worth little more in so few steps, so there it is 0.97."""

TRANSLATORS = ("marian", "t5")
"""Their target is text as well, of which they say the next token."""

ROWS_SPARSE = 0.5
"""Share of its largest value below which entropy counts as fallen."""

SPIKE = 1.5
"""A training loss beyond this times that of knowing nothing is a spike."""


@dataclass(frozen=True)
class Panel:
    """One panel of a figure: its title, what of a series is drawn, and whether on a log scale."""

    title: str
    key: str
    log: bool = False


@dataclass(frozen=True)
class Figure:
    """Courses of runs: a row of panels for each group of variants, a line for each variant.

    Attributes:
        rows: names of variants.
        panels: of each row.
        log_steps: whether steps are on a log scale, for what happens in the first ones.
    """

    rows: tuple[tuple[str, ...], ...]
    panels: tuple[Panel, ...]
    log_steps: bool = False

    @property
    def names(self) -> frozenset[str]:
        """Of the variants that are drawn."""
        return frozenset(name for row in self.rows for name in row)


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        key: its name on the command line.
        title: a few words.
        text: what is claimed, and where.
        variants: the runs; those that several claims or names have in common are done once.
        judge: from what is committed of the runs to a verdict.
        needs: what the judge reads beyond losses, accuracies and lowest entropies, which are there
            for every run.
        figure: what is drawn of the seed that ended best.
        rows: gives the lines of the page in place of a row for each variant, where they are many.
        appendix: gives lines of the page that come from files beside the runs.
        seeds: how many, at least.
        quick: a few of the variants, whose runs take seconds.
    """

    key: str
    title: str
    text: str
    variants: tuple[Variant, ...]
    judge: Callable[[Results], Verdict]
    needs: frozenset[str] = frozenset()
    figure: Figure | None = None
    rows: Callable[[Results], list[str]] | None = None
    appendix: Callable[[], list[str]] | None = None
    seeds: int = 3
    quick: tuple[str, ...] = ()


def losses(results: Results, name: str) -> list[float]:
    """Return the test losses of a variant; infinite where a run ended in NaN."""
    return [math.inf if r["test_loss"] is None else r["test_loss"] for r in results[name]]


def failed_share(model: str) -> float:
    """Return the share of the loss of knowing nothing above which a run of a model failed."""
    return BARELY if model in (*DECODERS, *TRANSLATORS) else FAILED_SHARE


def failures(results: Results, name: str) -> int:
    """Return how many runs of a variant learnt next to nothing."""
    shares = [failed_share(run["settings"]["model"]) for run in results[name]]
    runs = zip(losses(results, name), shares, results[name], strict=True)
    return sum(loss > share * run["reference"] for loss, share, run in runs)


def mostly_fails(results: Results, name: str) -> bool:
    """Return whether more than half of the runs of a variant failed."""
    return failures(results, name) > len(results[name]) / 2


def stands_at_chance(run: Mapping[str, Any]) -> bool:
    """Return whether a run ended at the loss of knowing nothing, above it or in NaN."""
    loss = run["test_loss"]
    return loss is None or loss > BARELY * run["reference"]


def crash_step(
    losses: Sequence[float | None],
    reference: float,
    lost_step: int | None,
    share: float = FAILED_SHARE,
) -> int | None:
    """Return the step at which a run crashed: of a spike that it did not recover from, or a loss.

    A run recovered from a spike if its loss, as a running median of five around each step, came
    within `share` of `reference` later on: it trained. A loss that only comes back to that of
    knowing nothing did not.

    Args:
        losses: of training, steps 1, 2, ...; None where not finite.
        reference: the loss of knowing nothing; a spike is beyond `SPIKE` times it.
        lost_step: where the loss was lost for good: see `hf_stable.measures.loss_curves.lost_step`.
        share: see `failed_share`.

    Returns:
        Whichever comes first; None for a run that recovers, or stalls without either.
    """
    numbers = [math.inf if loss is None else loss for loss in losses]
    levels = enumerate(smooth(numbers, centred=True), start=1)
    trained = max((step for step, level in levels if level <= share * reference), default=0)
    spikes = (
        step
        for step, loss in enumerate(numbers, start=1)
        if step > trained and loss > SPIKE * reference
    )
    steps = [step for step in (next(spikes, None), lost_step) if step is not None]
    return min(steps, default=None)


def window(by_value: Mapping[float, float], limit: float) -> tuple[float, float] | None:
    """Return the lowest and the highest value around the best one whose loss is within a limit.

    The loss is taken as linear in the logarithm of the value (a rate, say) between those that were
    tried, so that the width does not jump by their spacing.

    Args:
        by_value: mean loss by value, infinite ones too.
        limit: the highest loss that counts.

    Returns:
        None if the best loss is beyond the limit. An end that is the first or the last value tried
        is one that was cut off.
    """
    tried = sorted(by_value)
    best = min(tried, key=lambda value: by_value[value])
    if by_value[best] > limit:
        return None

    def end(outwards: list[float]) -> float:
        for inner, outer in zip(outwards, outwards[1:], strict=False):
            if by_value[outer] > limit:
                share = (limit - by_value[inner]) / (by_value[outer] - by_value[inner])
                return inner * (outer / inner) ** share
        return outwards[-1]

    middle = tried.index(best)
    return end(tried[middle::-1]), end(tried[middle:])


def text_of(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and standard deviation."""
    if any(not math.isfinite(v) for v in values):
        return "NaN"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def short(value: float) -> str:
    """Return three digits of a mean loss; NaN where a run ended in it."""
    return f"{value:.3g}" if math.isfinite(value) else "NaN"


def loss_text(results: Results, name: str) -> str:
    """Return the mean loss of a variant, and how many of its runs failed, if any did."""
    failed = failures(results, name)
    return short(mean(losses(results, name))) + (f" ({failed} fail)" if failed else "")


def of(settings: Mapping[str, Settings]) -> tuple[Variant, ...]:
    """Return settings by name as variants."""
    return tuple(Variant(name, each) for name, each in settings.items())

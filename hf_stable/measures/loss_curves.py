"""Levels and noise of a loss from step to step, and where it was lost; on plain numbers.

Levels are medians and noise is a median absolute deviation, so that single batches decide nothing.
Losses are skewed to the right: a hard batch is further from the median than an easy one. So noise
is taken from the losses above the median, since a rise has to be told from these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

__all__ = ["FEWEST", "SMOOTHING", "WINDOW", "lost_step", "noise", "smooth"]

SMOOTHING = 5
"""Losses in the running median: two wild batches do not move it."""

WINDOW = 50
"""Losses that a level's noise is estimated from."""

FEWEST = 20
"""Losses that noise can be estimated from."""

LOST_MARGIN = 0.1
"""A run is lost where it never again comes within this share of its best loss before."""

LOST_SCORE = 3.0
"""Or within so many times the loss's noise, where that is more: what batches do by themselves."""

ROBUST_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


def noise(losses: Sequence[float]) -> float:
    """Return the standard deviation of losses around their course, from those above it.

    The course is a centred running median of eleven; 1.4826 times the median of what lies above it
    is the standard deviation where the noise is normal.

    Args:
        losses: finite ones of successive steps; of fewer than `FEWEST` nothing can be said: 0.
    """
    if len(losses) < FEWEST:
        return 0.0
    excess = (
        losses[i] - median(losses[i - SMOOTHING : i + SMOOTHING + 1])
        for i in range(SMOOTHING, len(losses) - SMOOTHING)
    )
    return ROBUST_SIGMA * median([above for above in excess if above > 0] or [0.0])


def smooth(losses: Sequence[float], *, centred: bool = False) -> list[float]:
    """Return the running median of `SMOOTHING` losses; NaN counts as infinite.

    Args:
        losses: of successive steps.
        centred: take the median around each step, which does not lag but needs what comes after;
            otherwise of the steps up to it, as the rule of the alarms sees them.
    """
    clean = [loss if math.isfinite(loss) else math.inf for loss in losses]
    ahead = SMOOTHING // 2 if centred else 0
    return [
        median(clean[max(0, i + ahead - SMOOTHING + 1) : i + ahead + 1]) for i in range(len(clean))
    ]


def lost_step(losses: Sequence[float]) -> int | None:
    """Return the step after which a loss never again comes near its best.

    Near means within 10 % of the best, or within three times the noise of the losses until then if
    that is more: a single batch can lift a small loss by more than 10 %. Losses are smoothed around
    each step, so that one or two wild batches do not count. Fewer than five losses at the end are
    not enough to say "never again", unless they are not finite.

    Args:
        losses: of steps 1, 2, ...; may hold NaN.

    Returns:
        The step (counted from 1), or None for a run that is not lost at its end.
    """
    best, limit, last = math.inf, math.inf, 0
    for step, level in enumerate(smooth(losses, centred=True), start=1):
        if level < best:
            best = level
            before = [loss for loss in losses[max(0, step - WINDOW) : step] if math.isfinite(loss)]
            limit = best + max(LOST_MARGIN * abs(best), LOST_SCORE * noise(before))
        if math.isfinite(level) and level <= limit:
            last = step
    gone = losses[last:]
    if not gone or (len(gone) < SMOOTHING and math.isfinite(gone[-1])):
        return None
    return last + 1

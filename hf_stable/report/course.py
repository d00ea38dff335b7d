"""The course of a loss, measured on its own scale: its first level and its noise. Plain numbers.

Losses of all kinds have to be judged alike: next tokens of text begin at 10 nats and end at 3, two
classes begin at 0.69 and may end at 0.6. So nothing here is a share that a loss has to come down
by. A level is a median of a few records. It differs from another where noise alone does not make
such a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from hf_stable.measures.loss_curves import FEWEST, SMOOTHING, WINDOW, lost_step, noise, smooth

__all__ = ["Course", "course_of", "find_loss_of_course"]

SMALLEST_SHARE = 0.01
"""A level within this share of another is the same, however little noise there is."""

LEVEL_SCORE = 2.0
"""Nor does it differ if noise makes such a difference in one of twenty cases."""

MEDIAN_OVER_MEAN = 1.2533
"""Standard deviation of a median over that of a mean, of normal noise."""

ROBUST_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""

OUTBREAK = 1.5
"""A loss beyond this times its first level has broken out."""

GIVEN_BACK, GIVEN_BACK_BY_FEW = 0.2, 0.5
"""A loss that ends above its best is lost only if it gave back this share of what it had gained:
a loss near zero is never within 10 % of its best for long. Of fewer than 20 records the last are no
level, and the share is larger."""

LOST_MARGIN, LOST_SCORE = 0.1, 3.0
"""And only if it is further from the best than this share, and than so many times the noise."""


class Course(NamedTuple):
    """Levels of a loss, in its own unit.

    Attributes:
        first: level at the beginning.
        middle: level half-way, but no more than the first.
        last: level at the end.
        best: the lowest level.
        highest: the highest level after the first.
        noise: standard deviation of a record around the course; 0 where there are too few to tell.
        margin: difference between two levels that says nothing.
    """

    first: float
    middle: float
    last: float
    best: float
    highest: float
    noise: float
    margin: float

    @property
    def moved(self) -> bool:
        """Whether the loss came down from its first level."""
        return self.first - self.last > self.margin

    @property
    def rose(self) -> bool:
        """Whether the loss ended well above its first level: an accusation takes more."""
        return self.last - self.first > 2 * self.margin

    @property
    def moves_late(self) -> bool:
        """Whether it still came down in the second half."""
        return self.middle - self.last > self.margin

    @property
    def broke_out(self) -> bool:
        """Whether it was far above its first level on the way."""
        return self.highest > OUTBREAK * self.first > 0


def course_of(losses: Sequence[float]) -> Course | None:
    """Return the levels of a loss; None for fewer than two finite ones.

    Args:
        losses: records in the order of steps; what is not finite is left out.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return None
    width = _width(finite)
    first, last = median(finite[:width]), median(finite[-width:])
    half = len(finite) // 2
    levels = _levels(finite)
    deviation = _noise(finite)
    of_level = MEDIAN_OVER_MEAN * deviation / math.sqrt(width)
    return Course(
        first=first,
        middle=min(first, median(finite[max(0, half - width) : half + width])),
        last=last,
        best=min(levels),
        highest=max(levels),
        noise=deviation,
        margin=max(SMALLEST_SHARE * abs(first), LEVEL_SCORE * math.sqrt(2) * of_level),
    )


def find_loss_of_course(losses: Sequence[float]) -> int | None:
    """Return the position of the first record from which a loss is lost at the end, or None.

    Of 20 records and more it is lost where `lost_step` says, if it has given back a fifth of what
    it had gained. Fewer are mostly means over many steps, which need no smoothing: the last one is
    compared with the best.

    Args:
        losses: records in the order of steps; may hold NaN, but not at the end.
    """
    course = course_of(losses)
    if course is None:
        return None
    gained, given_back = course.first - course.best, course.last - course.best
    if len(losses) >= FEWEST:
        step = lost_step(losses)
        return step - 1 if step is not None and given_back > GIVEN_BACK * gained else None
    # What came after the best one may be anything but noise.
    before = [loss for loss in losses if math.isfinite(loss)]
    deviation = _noise(before[: before.index(course.best) + 1])
    limit = course.best + max(LOST_MARGIN * abs(course.best), LOST_SCORE * deviation)
    if course.last <= limit or given_back <= GIVEN_BACK_BY_FEW * gained:
        return None
    return max(i + 1 for i, loss in enumerate(losses) if math.isfinite(loss) and loss <= limit)


def _width(losses: Sequence[float]) -> int:
    """Return how many records make a level."""
    return max(1, min(SMOOTHING, len(losses) // 4))


def _levels(losses: Sequence[float]) -> list[float]:
    return smooth(losses) if len(losses) >= FEWEST else list(losses)


def _noise(losses: Sequence[float]) -> float:
    """Return the standard deviation of a record around the course."""
    if len(losses) >= FEWEST:
        return noise(losses[-WINDOW:])
    # How far each is from the middle of its neighbours: of independent noise, sqrt(3/2) as far.
    bends = [
        abs(losses[i] - (losses[i - 1] + losses[i + 1]) / 2) for i in range(1, len(losses) - 1)
    ]
    return ROBUST_SIGMA * median(bends) / math.sqrt(1.5) if len(bends) > 1 else 0.0

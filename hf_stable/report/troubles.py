"""How a loss left its course: rules on its own scale, and on what attention did meanwhile."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from hf_stable.monitor.thresholds import Thresholds
from hf_stable.report.collapses import Collapse, last_stretch
from hf_stable.report.course import Course, course_of, find_loss_of_course
from hf_stable.report.run_records import RunRecords

__all__ = ["LossTrouble", "fault_of", "find_trouble", "is_at_guessing"]

GUESSING = (0.97, 1.1)
"""A loss between these shares of that of guessing knows nothing but how frequent the labels are.
One far above it is another loss, or has more parts than a cross-entropy."""


class LossTrouble(NamedTuple):
    """How the loss left its course, and where: a loss that "stalled" was never on any."""

    kind: Literal["nonfinite", "lost", "stalled"]
    step: int | None


def find_trouble(
    run: RunRecords, collapse: Collapse | None, limits: Thresholds
) -> LossTrouble | None:
    """Say where the loss left its course.

    It is "nonfinite" if the run ends with a NaN or infinite loss, and "lost" where it never again
    comes near its best (`find_loss_of_course`). It "stalled" where attention collapsed and the loss
    stayed high: it hardly came down, or no longer did in the second half, or it broke out and never
    came back to less than it began with. Without a collapse, or with one of a few heads that was
    there before, a loss that hardly moves is no failure: it may have been low from the start.
    """
    values = [value for _, value in run.losses]
    bad = last_stretch([not math.isfinite(value) for value in values])
    if bad is not None:
        return LossTrouble("nonfinite", run.losses[bad][0])
    lost = find_loss_of_course(values)
    if lost is not None:
        return LossTrouble("lost", run.losses[lost][0])
    course = course_of(values)
    if course is not None and _stalled(run, course, collapse, limits):
        return LossTrouble("stalled", None)
    return None


def fault_of(run: RunRecords) -> str:
    """Say in what a loss that was not lost did not do what training is for; "" if it did."""
    course = course_of([value for _, value in run.losses])
    if course is None or (course.moved and not is_at_guessing(run, course)):
        return ""
    return "The loss rose" if course.rose else "The loss hardly moved"


def is_at_guessing(run: RunRecords, course: Course) -> bool:
    """Return whether the loss ended where that of guessing is, as far as that is known."""
    if run.guessing is None:
        return False
    low, high = GUESSING
    return low * run.guessing < course.last < high * run.guessing


def _stalled(
    run: RunRecords, course: Course, collapse: Collapse | None, limits: Thresholds
) -> bool:
    is_high = course.last > limits.learnt * course.first or is_at_guessing(run, course)
    alarmed = any(alarm.kind == "collapse" for alarm in run.alarms)
    if not is_high or not (alarmed or _is_to_blame(collapse, limits)):
        return False
    return not course.moved or not course.moves_late or course.broke_out


def _is_to_blame(collapse: Collapse | None, limits: Thresholds) -> bool:
    return collapse is not None and collapse.is_malignant and not collapse.is_old_habit(limits)

"""How a loss left its course: rules on its own scale, and on what attention did meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from hf_stable.monitor.alarms import Thresholds
from hf_stable.report.collapses import Collapse, last_stretch
from hf_stable.report.course import Course, course_of, find_loss_of_course
from hf_stable.report.run_records import Event, RunRecords

__all__ = ["LossTrouble", "find_trouble", "hardly_moved", "is_at_guessing"]

GUESSING = 0.97
"""A loss above this share of that of guessing knows nothing but how frequent the labels are."""


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


def hardly_moved(run: RunRecords) -> bool:
    """Return whether a run's loss is where it began, or where guessing would be."""
    course = course_of([value for _, value in run.losses])
    return course is not None and (not course.moved or is_at_guessing(run, course))


def is_at_guessing(run: RunRecords, course: Course) -> bool:
    """Return whether the loss ended where that of guessing is, as far as that is known."""
    return run.guessing is not None and course.last > GUESSING * run.guessing


def _stalled(
    run: RunRecords, course: Course, collapse: Collapse | None, limits: Thresholds
) -> bool:
    is_high = course.last > limits.learnt * course.first or is_at_guessing(run, course)
    if not is_high or not (_is_to_blame(collapse, limits) or _has_alarm(run.events, run.attempt)):
        return False
    return not course.moved or not course.moves_late or course.broke_out


def _is_to_blame(collapse: Collapse | None, limits: Thresholds) -> bool:
    return collapse is not None and collapse.is_malignant and not collapse.is_old_habit(limits)


def _has_alarm(events: Sequence[Event], attempt: int) -> bool:
    """Return whether an alarm said that attention collapsed, on the way that led to the end."""
    return any(
        event.name == "alarm" and event.values.get("kind") == "collapse" and event.attempt == attempt
        for event in events
    )

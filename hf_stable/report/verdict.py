"""The judgement of a run by its records: rules on numbers, each of them tested.

The loss decides whether a run is in trouble; attention says where it began and what grew. Neither
low entropy nor concentrated energy alone is called harmful: runs with either can train well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hf_stable.monitor.thresholds import Thresholds
from hf_stable.report.collapses import Collapse, find_collapse
from hf_stable.report.course import course_of
from hf_stable.report.events import Event
from hf_stable.report.run_records import RunRecords
from hf_stable.report.sentences import about_run, advice_on, count_of, place_of
from hf_stable.report.troubles import LossTrouble, fault_of, find_trouble

__all__ = ["State", "Verdict", "judge"]

State = Literal["trained", "warned", "failed", "unfinished", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """The judgement of a run.

    Attributes:
        state: "failed" (also a run that an alarm stopped), "warned" (something to look at, but the
            loss was not lost), "trained", "unfinished" (it ended, or is, before the last step that
            was planned, and nothing was wrong with the loss until then), or "unknown" where there
            is too little to go by.
        headline: a few words.
        sentences: what was seen, in order.
        divergence_step: step at which the loss left its course, or an alarm stopped the run; or
            None.
        has_learnt: whether the loss was not lost and came down, as far as that can be told.
    """

    state: State
    headline: str
    sentences: tuple[str, ...]
    divergence_step: int | None = None
    has_learnt: bool = True


class _Seen(NamedTuple):
    """What the rules found in a run."""

    run: RunRecords
    collapse: Collapse | None
    is_habit: bool
    trouble: LossTrouble | None
    stop: Event | None
    fault: str

    @property
    def cause(self) -> Collapse | None:
        """The collapse, unless a few heads were so from the start, as in pretrained models."""
        return None if self.is_habit else self.collapse


def judge(run: RunRecords, thresholds: Thresholds | None = None) -> Verdict:
    """Judge a run by its records.

    Args:
        run: as read from disk.
        thresholds: what counts as sparse, low rank and learnt; those of the alarms by default.
    """
    limits = thresholds or Thresholds()
    collapse = find_collapse(run, limits)
    trouble, stop = find_trouble(run, collapse, limits), _last_stop(run)
    is_habit = collapse is not None and collapse.is_old_habit(limits)
    seen = _Seen(run, collapse, is_habit, trouble, stop, fault_of(run))
    sentences = about_run(run, collapse, trouble)
    if trouble is not None:
        sentences += advice_on(run, trouble, seen.cause)
    state, headline = _judge_failure(seen) or _judge_end(seen) or _judge_training(seen)
    divergence = trouble.step if trouble else stop.step if stop else None
    has_learnt = trouble is None and not seen.fault and state != "unknown"
    return Verdict(state, headline, tuple(sentences), divergence, has_learnt)


def _judge_failure(seen: _Seen) -> tuple[State, str] | None:
    """Return the verdict on a run that failed; None if it did not."""
    if seen.trouble is not None:
        return "failed", _failure(seen.run, seen.trouble, seen.cause)
    if seen.stop is not None:
        return "failed", f"Failed: stopped at step {seen.stop.step}{_by_alarm(seen.run, seen.stop)}"
    return None


def _judge_end(seen: _Seen) -> tuple[State, str] | None:
    """Return the verdict on a run that is not at its end, or of which nothing is known."""
    run = seen.run
    losses = [value for _, value in run.losses if math.isfinite(value)]
    if run.is_unfinished:
        planned = "" if run.max_steps is None else f" of {run.max_steps}"
        so_far = "too early to judge its loss"
        if course_of(losses) is not None:
            fault = seen.fault or "The loss came down"
            so_far = f"{fault[0].lower()}{fault[1:]} so far"
        alarms = f", after {count_of(len(run.alarms), 'alarm')}" if run.alarms else ""
        return (
            "unfinished",
            f"Unfinished: step {run.num_steps}{planned}; {so_far}{alarms}",
        )
    if not losses:
        return "unknown", "Nothing to judge by: no finite loss was recorded"
    if len(losses) == 1:
        return "unknown", "Too little to judge by: a single loss was recorded"
    return None


def _judge_training(seen: _Seen) -> tuple[State, str]:
    """Return the verdict on a run that came to its end without a failure."""
    run, collapse = seen.run, seen.collapse
    rollbacks = sum(event.name == "rollback" for event in run.events)
    after = f", after {count_of(rollbacks, 'rollback')}" if rollbacks else ""
    what = (seen.fault or "Trained") + after
    if run.alarms:
        alarms = count_of(len(run.alarms), "alarm")
        said = f"{what}; there was {alarms}" if seen.fault else f"Trained on after {alarms}"
        return "warned", said
    if collapse is not None and not seen.is_habit:
        kind = "malignant" if collapse.is_malignant else "benign"
        since = ", there from the first probe on," if collapse.from_start else ""
        return "warned", f"{what}, with a {kind} collapse of attention{since} to look at"
    watched = any("entropy_normalised" in probe.quantities for probe in run.probes)
    calm = "attention did not collapse" if watched else "attention was not watched"
    if collapse is not None:
        heads = f"{collapse.num_heads} of {count_of(collapse.total_heads, 'head')}"
        calm = f"{heads} sparse from the first probe on"
    return "warned" if seen.fault else "trained", f"{what}; {calm}"


def _last_stop(run: RunRecords) -> Event | None:
    """Return the stop that ended a run, if one did: a run may have gone on after another."""
    stops = [
        event
        for event in run.events
        if event.name == "stop" and event.step >= run.num_steps and event.attempt == run.attempt
    ]
    return stops[-1] if stops else None


def _by_alarm(run: RunRecords, stop: Event) -> str:
    """Say which alarm stopped a run, if its log has one at that step."""
    for event in run.alarms:
        if event.step == stop.step:
            return f" by an alarm: {event.kind}{place_of(run, event)}"
    return ""


def _failure(run: RunRecords, trouble: LossTrouble, collapse: Collapse | None) -> str:
    what = {
        "nonfinite": f"Failed: the loss is not finite from step {trouble.step} on",
        "lost": f"Failed: the loss was lost at step {trouble.step}",
        "stalled": "Failed: the loss never came down",
    }[trouble.kind]
    course = course_of([value for _, value in run.losses])
    if trouble.kind == "stalled" and course is not None and course.broke_out:
        what = "Failed: the loss broke out and never came down after that"
    elif trouble.kind == "stalled" and course is not None and course.moved:
        what = "Failed: the loss stands still far too high"
    if collapse is None or not collapse.is_malignant:
        return what
    if collapse.from_start:
        return f"{what}; attention was collapsed at the first probe, step {collapse.step}"
    if trouble.step is None:
        alarms = [e.step for e in run.alarms if e.kind == "collapse"]
        first = min([collapse.step, *alarms])
        alarm = "" if first == collapse.step else f" an alarm was raised at step {first},"
        return f"{what};{alarm} attention was found collapsed at step {collapse.step}"
    if collapse.step > trouble.step:
        return what
    return f"{what}, after attention collapsed at step {collapse.step}"

"""What a run's records show, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_stable.monitor.advice import advise
from hf_stable.monitor.terms import UNUSED_SHARE
from hf_stable.report.collapses import Collapse, find_growth
from hf_stable.report.course import Course, course_of
from hf_stable.report.events import Event
from hf_stable.report.run_records import RunRecords
from hf_stable.report.troubles import LossTrouble, is_at_guessing
from hf_stable.report.values import to_number

__all__ = ["about_run", "advice_on", "count_of", "place_of"]

GROWTH_WORTH_SAYING = 2.0


def about_run(run: RunRecords, collapse: Collapse | None, trouble: LossTrouble | None) -> list[str]:
    """Return what was seen: the loss, the collapse of attention, unused heads, events."""
    return [
        *_about_loss(run, trouble),
        *_about_collapse(run, collapse, trouble),
        *_about_unused(run),
        *_about_events(run),
    ]


def _about_loss(run: RunRecords, trouble: LossTrouble | None) -> list[str]:
    finite = [(step, value) for step, value in run.losses if math.isfinite(value)]
    if not finite:
        return ["No loss was recorded."] if not run.losses else ["No recorded loss is finite."]
    best_step, best = min(finite, key=lambda entry: entry[1])
    (first_step, first), (last_step, last) = finite[0], finite[-1]
    if trouble is not None and trouble.kind == "nonfinite":
        return [
            f"The loss is NaN or infinite from step {trouble.step} to the end; before, it went "
            f"from {first:.4g} (step {first_step}) to {best:.4g} at best (step {best_step})."
        ]
    if trouble is not None and trouble.kind == "lost":
        return [
            f"From step {trouble.step} on the loss never came back to within 10 % of its best, "
            f"{best:.4g} (step {best_step}); it ended at {last:.4g} (step {last_step})."
        ]
    way = "fell" if last < first else "rose" if last > first else "went"
    sentences = [
        f"The loss {way} from {first:.4g} (step {first_step}) to {last:.4g} (step {last_step})."
    ]
    course = course_of([value for _, value in finite])
    if course is not None:
        sentences += _about_course(run, course)
    return sentences


def _about_course(run: RunRecords, course: Course) -> list[str]:
    """Return what is remarkable in the levels of a loss that was not lost."""
    sentences = []
    if course.broke_out:
        step, highest = max(run.losses, key=lambda entry: (math.isfinite(entry[1]), entry[1]))
        sentences.append(
            f"On the way it broke out to {highest:.4g} (step {step}), {highest / course.first:.2g} "
            "times its first level."
        )
    if is_at_guessing(run, course):
        sentences.append(
            f"Guessing among all labels would cost {run.guessing:.4g}: the model knows no more."
        )
    elif not course.moved:
        sentences.append(
            f"Its level was {course.first:.4g} in the beginning and {course.last:.4g} in the end"
            f"{'.' if course.rose else ': no more than noise apart.'}"
        )
    return sentences


def _about_collapse(
    run: RunRecords, collapse: Collapse | None, trouble: LossTrouble | None
) -> list[str]:
    if collapse is None:
        return []
    kind = "malignant" if collapse.is_malignant else "benign"
    shape = "sparse and of low rank" if collapse.is_malignant else "sparse, yet of high rank"
    rank = "" if math.isnan(collapse.rank) else f", rank {collapse.rank:.2g} of 1"
    where = _place(run, collapse.layer, collapse.head)
    began = (
        f"Attention was collapsed at the first probe already (step {collapse.step}) in {where}"
        if collapse.from_start
        else f"Collapse of attention began at step {collapse.step} in {where}"
    )
    sentences = [
        f"{began}: {kind} ({shape}), entropy at {collapse.share:.0%} of its largest possible "
        f"value{rank}; in the end {collapse.num_heads} of {count_of(collapse.total_heads, 'head')}."
    ]
    growth = find_growth(run, collapse)
    if growth is not None and growth.factor >= GROWTH_WORTH_SAYING:
        sentences.append(
            f"There sigma1(Wq^T Wk) grew {growth.factor:.3g} x in "
            f"{count_of(growth.last_step - growth.first_step, 'step')}, from {growth.before:.3g} "
            f"(step {growth.first_step}) to {growth.after:.3g} (step {growth.last_step})."
        )
    return [*sentences, *_about_consequence(run, collapse, trouble)]


def _about_consequence(
    run: RunRecords, collapse: Collapse, trouble: LossTrouble | None
) -> list[str]:
    """Say what the loss did when attention collapsed, where there is something to say."""
    if trouble is None:
        course = course_of([value for _, value in run.losses])
        did_well = course is not None and course.moved and not course.broke_out
        if run.alarms or collapse.from_start or not did_well:
            return []
        return ["The loss did not suffer from it: sparse attention alone does no harm."]
    if trouble.step is None:
        before = [v for step, v in run.losses if step < collapse.step and math.isfinite(v)]
        after = [v for step, v in run.losses if step >= collapse.step]
        course, since = course_of([*before, *after]), course_of(after)
        if course is None or since is None or abs(since.first - since.last) > course.margin:
            return []
        still = not before or abs(course.first - since.first) <= course.margin
        when = "before it and after" if before and still else "from there on"
        return [f"The loss stood still {when}."]
    if collapse.from_start:
        return []
    delay = trouble.step - collapse.step
    if delay > 0:
        return [f"The loss followed {count_of(delay, 'step')} later."]
    if delay < 0:
        steps = count_of(-delay, "step")
        return [f"The loss had left its course {steps} before: attention followed it."]
    return ["The loss left its course at the same step."]


def _about_unused(run: RunRecords) -> list[str]:
    watched = [p for p in run.probes if p.quantities.get("entropy_normalised")]
    if not watched:
        return []
    shares = [
        number
        for values in watched[-1].quantities["entropy_normalised"].values()
        for value in (values if isinstance(values, list) else [])
        if math.isfinite(number := to_number(value))
    ]
    unused = sum(share >= UNUSED_SHARE for share in shares)
    if not unused:
        return []
    return [
        f"{unused} of {count_of(len(shares), 'head')} still looked everywhere alike at step "
        f"{watched[-1].step} (entropy at its largest): unused, which is not a sign of health."
    ]


def _about_events(run: RunRecords) -> list[str]:
    sentences = []
    kinds: dict[str, list[int]] = {}
    for event in run.events:
        if event.name == "alarm":
            kinds.setdefault(event.kind, []).append(event.step)
    for event in run.events:
        if event.name == "alarm":
            steps = kinds.pop(event.kind, [])
            if steps:  # otherwise it is told with the first of its kind
                sentences.append(_about_alarm(run, event, steps))
        elif event.name == "rollback":
            sentences.append(
                f"At step {event.step} training went back to step {event.to_step}, to go on at "
                f"{event.lr_scale:g} times the learning rate."
            )
        elif event.name == "skip":
            sentences.append(f"The batches of step {event.step} were skipped.")
        else:
            sentences.append(f"Training was stopped at step {event.step}: {event.reason}.")
    return sentences


def _about_alarm(run: RunRecords, alarm: Event, steps: Sequence[int]) -> str:
    """Tell an alarm, and how many of its kind there were."""
    reason = f": {alarm.reason}" if alarm.reason else ""
    more = f" ({len(steps) - 1} more of its kind, the last at step {max(steps)})"
    return (
        f"Alarm at step {alarm.step}, {alarm.kind}{place_of(run, alarm)}{reason}"
        f"{more if len(steps) > 1 else ''}."
    )


def advice_on(run: RunRecords, trouble: LossTrouble, collapse: Collapse | None) -> list[str]:
    """Return what to try.

    Args:
        run: that failed.
        trouble: how.
        collapse: that may have caused it, if any did.
    """
    # Benign attention, and what came after the loss had gone, is not what is to be treated.
    treats_loss = (
        collapse is None
        or not collapse.is_malignant
        or (trouble.step is not None and collapse.step > trouble.step)
    )
    if treats_loss:
        advice = advise("nonfinite" if trouble.kind == "nonfinite" else "spike")
        return [f"To try: {advice}."]
    has_adamw2 = any(probe.rates for probe in run.probes)
    has_sigma = any("gamma" in probe.quantities for probe in run.probes)
    ways = []
    if not has_adamw2:
        ways.append(
            'AdamW2 (optim="adamw2") would cap every step of a matrix at tau of its own sigma1'
        )
    if not has_sigma:
        ways.append(
            'sigmaReparam (hf_stable.patch(model, "sigma_reparam")) would let sigma1 grow through '
            "gamma alone"
        )
    ways.append(
        "a lower learning rate or a warmup would slow the growth down"
        if ways
        else "With AdamW2 and sigmaReparam in use already: lower tau or the learning rate"
    )
    return ["To try: " + "; ".join(ways) + "."]


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: 1 step, 2 steps."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def place_of(run: RunRecords, alarm: Event) -> str:
    """Return " in layer 3, head 1" for where an alarm was, or nothing."""
    return f" in {_place(run, alarm.layer, alarm.head)}" if alarm.layer else ""


def _place(run: RunRecords, layer: str, head: int | None) -> str:
    name = run.short_names.get(layer, layer)
    where = f"layer {name}" if name != layer else layer
    return where if head is None else f"{where}, head {head}"

"""What a run's records say, in plain sentences: rules on numbers, each of them tested.

The loss decides whether a run is in trouble; attention says where it began and what grew. Neither
low entropy nor concentrated energy alone is called harmful: runs with either can train well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hf_stable.monitor.alarms import ADVICE, Thresholds
from hf_stable.monitor.terms import UNUSED_SHARE
from hf_stable.report.findings import (
    Collapse,
    LossTrouble,
    find_collapse,
    find_growth,
    find_trouble,
    hardly_moved,
)
from hf_stable.report.run_records import Event, RunRecords, short_names
from hf_stable.report.values import to_number

__all__ = ["Verdict", "judge"]

State = Literal["trained", "warned", "failed", "unknown"]

GROWTH_WORTH_SAYING = 2.0


@dataclass(frozen=True)
class Verdict:
    """The judgement of a run.

    Attributes:
        state: "failed" (also a run that an alarm stopped), "warned" (something to look at, but the
            loss was not lost), "trained", or "unknown" where there is too little to go by.
        headline: a few words.
        sentences: what was seen, in order.
        divergence_step: step at which the loss left its course, or an alarm stopped the run; or
            None.
    """

    state: State
    headline: str
    sentences: tuple[str, ...]
    divergence_step: int | None = None


def judge(run: RunRecords, thresholds: Thresholds | None = None) -> Verdict:
    """Judge a run by its records.

    Args:
        run: as read from disk.
        thresholds: what counts as sparse, low rank and learnt; those of the alarms by default.
    """
    limits = thresholds or Thresholds()
    collapse = find_collapse(run, limits)
    trouble = find_trouble(run, collapse, limits)
    stop = _last_stop(run)
    # What a few heads did from the start, as in pretrained models, explains no failure.
    cause = None if collapse is None or collapse.is_old_habit(limits) else collapse
    alarms = [event for event in run.events if event.name == "alarm"]
    sentences = [
        *_about_loss(run, trouble),
        *_about_collapse(run, collapse, trouble),
        *_about_unused(run),
        *_about_events(run),
    ]
    if trouble is not None:
        sentences += _advice(run, trouble, cause)
    stands_still = hardly_moved([value for _, value in run.losses], limits)
    state: State
    if trouble is not None:
        state, headline = "failed", _failure(run, trouble, cause)
    elif stop is not None:
        state, headline = "failed", f"Failed: stopped at step {stop.step}{_by_alarm(run, stop)}"
    elif not _finite_losses(run):
        state, headline = "unknown", "Nothing to judge by: no finite loss was recorded"
    elif alarms:
        what = "The loss hardly moved; there was" if stands_still else "Trained on after"
        state, headline = "warned", f"{what} {_count(len(alarms), 'alarm')}"
    elif collapse is not None and collapse.is_old_habit(limits):
        heads = f"{collapse.num_heads} of {_count(collapse.total_heads, 'head')}"
        state, headline = "trained", f"Trained; {heads} sparse from the first probe on"
    elif collapse is not None:
        kind = "malignant" if collapse.is_malignant else "benign"
        since = ", there from the first probe on," if collapse.from_start else ""
        state = "warned"
        headline = f"Trained, with a {kind} collapse of attention{since} to look at"
    else:
        watched = any("entropy_normalised" in p.quantities for p in run.probes)
        calm = "attention did not collapse" if watched else "attention was not watched"
        state, headline = "trained", f"Trained; {calm}"
        if stands_still:
            state, headline = "warned", f"The loss hardly moved; {calm}"
    divergence = trouble.step if trouble else stop.step if stop else None
    return Verdict(state, headline, tuple(sentences), divergence)


def _last_stop(run: RunRecords) -> Event | None:
    """Return the stop that ended a run, if one did: a run may have gone on after another."""
    stops = [e for e in run.events if e.name == "stop" and e.step >= run.num_steps]
    return stops[-1] if stops else None


def _by_alarm(run: RunRecords, stop: Event) -> str:
    """Say which alarm stopped a run, if its log has one at that step."""
    for event in run.events:
        if event.name == "alarm" and event.step == stop.step:
            layer, head = event.values.get("layer"), event.values.get("head")
            where = f" in {_where(run, layer, head)}" if isinstance(layer, str) else ""
            return f" by an alarm: {event.values.get('kind', 'unknown')}{where}"
    return ""


def _finite_losses(run: RunRecords) -> list[tuple[int, float]]:
    return [(step, value) for step, value in run.losses if math.isfinite(value)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _where(run: RunRecords, layer: str, head: int | None) -> str:
    name = short_names(run.layers).get(layer, layer)
    where = f"layer {name}" if name != layer else layer
    return where if head is None else f"{where}, head {head}"


def _about_loss(run: RunRecords, trouble: LossTrouble | None) -> list[str]:
    finite = _finite_losses(run)
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
    moved = "fell" if last < first else "went"
    sentence = (
        f"The loss {moved} from {first:.4g} (step {first_step}) to {last:.4g} (step {last_step})"
    )
    return [sentence + (", hardly at all." if trouble is not None else ".")]


def _about_collapse(
    run: RunRecords, collapse: Collapse | None, trouble: LossTrouble | None
) -> list[str]:
    if collapse is None:
        return []
    kind = "malignant" if collapse.is_malignant else "benign"
    shape = "sparse and of low rank" if collapse.is_malignant else "sparse, yet of high rank"
    rank = "" if math.isnan(collapse.rank) else f", rank {collapse.rank:.2g} of 1"
    where = _where(run, collapse.layer, collapse.head)
    began = (
        f"Attention was collapsed at the first probe already (step {collapse.step}) in {where}"
        if collapse.from_start
        else f"Collapse of attention began at step {collapse.step} in {where}"
    )
    sentences = [
        f"{began}: {kind} ({shape}), entropy at {collapse.share:.0%} of its largest possible "
        f"value{rank}; in the end {collapse.num_heads} of {_count(collapse.total_heads, 'head')}."
    ]
    growth = find_growth(run, collapse)
    if growth is not None and growth.factor >= GROWTH_WORTH_SAYING:
        sentences.append(
            f"There sigma1(Wq^T Wk) grew {growth.factor:.3g} x in "
            f"{_count(growth.last_step - growth.first_step, 'step')}, from {growth.before:.3g} "
            f"(step {growth.first_step}) to {growth.after:.3g} (step {growth.last_step})."
        )
    if trouble is None:
        if any(event.name == "alarm" for event in run.events):
            return sentences  # which says otherwise
        harmless = "The loss did not suffer from it: sparse attention alone does no harm."
        return sentences if collapse.from_start else [*sentences, harmless]
    if trouble.step is None:
        when = "from there on" if collapse.from_start else "before it and after"
        return [*sentences, f"The loss stood still {when}."]
    if collapse.from_start:
        return sentences
    delay = trouble.step - collapse.step
    if delay > 0:
        sentences.append(f"The loss followed {_count(delay, 'step')} later.")
    elif delay < 0:
        sentences.append(
            f"The loss had left its course {_count(-delay, 'step')} before: attention followed it."
        )
    else:
        sentences.append("The loss left its course at the same step.")
    return sentences


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
        f"{unused} of {_count(len(shares), 'head')} still looked everywhere alike at step "
        f"{watched[-1].step} (entropy at its largest): unused, which is not a sign of health."
    ]


def _about_events(run: RunRecords) -> list[str]:
    sentences = []
    kinds: dict[object, list[int]] = {}
    for event in run.events:
        if event.name == "alarm":
            kinds.setdefault(event.values.get("kind"), []).append(event.step)
    for event in run.events:
        found = event.values
        if event.name == "alarm":
            steps = kinds.pop(found.get("kind"), [])
            if not steps:
                continue  # told with the first of its kind
            layer, head = found.get("layer"), found.get("head")
            where = f" in {_where(run, layer, head)}" if isinstance(layer, str) else ""
            reason = f": {found['reason']}" if found.get("reason") else ""
            more = f" ({len(steps) - 1} more of its kind, the last at step {max(steps)})"
            sentences.append(
                f"Alarm at step {event.step}, {found.get('kind', 'unknown')}{where}{reason}"
                f"{more if len(steps) > 1 else ''}."
            )
        elif event.name == "rollback":
            sentences.append(
                f"At step {event.step} training went back to step {found.get('to_step', '?')}, to "
                f"go on at {to_number(found.get('lr_scale')):g} times the learning rate."
            )
        else:
            sentences.append(f"Training was stopped at step {event.step}: {found.get('reason')}.")
    return sentences


def _failure(run: RunRecords, trouble: LossTrouble, collapse: Collapse | None) -> str:
    what = {
        "nonfinite": f"Failed: the loss is not finite from step {trouble.step} on",
        "lost": f"Failed: the loss was lost at step {trouble.step}",
        "stalled": "Failed: the loss never came down",
    }[trouble.kind]
    if collapse is None or not collapse.is_malignant:
        return what
    if collapse.from_start:
        return f"{what}; attention was collapsed at the first probe, step {collapse.step}"
    if trouble.step is None:
        alarms = [
            event.step
            for event in run.events
            if event.name == "alarm" and event.values.get("kind") == "collapse"
        ]
        first = min([collapse.step, *alarms])
        alarm = "" if first == collapse.step else f" an alarm was raised at step {first},"
        return f"{what};{alarm} attention was found collapsed at step {collapse.step}"
    if collapse.step > trouble.step:
        return what
    return f"{what}, after attention collapsed at step {collapse.step}"


def _advice(run: RunRecords, trouble: LossTrouble, collapse: Collapse | None) -> list[str]:
    # Benign attention, and what came after the loss had gone, is not what is to be treated.
    treats_loss = (
        collapse is None
        or not collapse.is_malignant
        or (trouble.step is not None and collapse.step > trouble.step)
    )
    if treats_loss:
        advice = ADVICE["nonfinite" if trouble.kind == "nonfinite" else "spike"]
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

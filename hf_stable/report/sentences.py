"""What a run's records show, in plain sentences."""

from __future__ import annotations

import math

from hf_stable.monitor.alarms import ADVICE
from hf_stable.monitor.terms import UNUSED_SHARE
from hf_stable.report.collapses import Collapse, find_growth
from hf_stable.report.course import Course, course_of
from hf_stable.report.run_records import Event, RunRecords, short_names
from hf_stable.report.troubles import LossTrouble
from hf_stable.report.values import to_number

__all__ = ["about_run", "advice_on", "count_of", "place_of"]

GROWTH_WORTH_SAYING = 2.0


def about_run(
    run: RunRecords, collapse: Collapse | None, trouble: LossTrouble | None
) -> list[str]:
    """Return what was seen: the loss, the collapse of attention, unused heads, events."""
    return [
        *_about_loss(run, trouble),
        *_about_collapse(run, collapse, trouble),
        *_about_unused(run),
        *_about_events(run),
    ]


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
    where = place_of(run, collapse.layer, collapse.head)
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
        sentences.append(f"The loss followed {count_of(delay, 'step')} later.")
    elif delay < 0:
        sentences.append(
            f"The loss had left its course {count_of(-delay, 'step')} before: attention followed it."
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
        f"{unused} of {count_of(len(shares), 'head')} still looked everywhere alike at step "
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
            where = f" in {place_of(run, layer, head)}" if isinstance(layer, str) else ""
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


def advice_on(run: RunRecords, trouble: LossTrouble, collapse: Collapse | None) -> list[str]:
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


def _finite_losses(run: RunRecords) -> list[tuple[int, float]]:
    return [(step, value) for step, value in run.losses if math.isfinite(value)]


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def place_of(run: RunRecords, layer: str, head: int | None) -> str:
    name = short_names(run.layers).get(layer, layer)
    where = f"layer {name}" if name != layer else layer
    return where if head is None else f"{where}, head {head}"

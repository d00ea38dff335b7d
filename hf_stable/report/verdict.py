"""What a run's records say, in plain sentences: rules on numbers, each of them tested.

The loss decides whether a run is in trouble; attention says where it began and what grew. Neither
low entropy nor concentrated energy alone is called harmful: runs with either can train well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

from hf_stable.alarms import ADVICE, SMOOTHING, Thresholds, lost_step, smooth
from hf_stable.report.records import RunRecords, short_names, to_number
from hf_stable.stability_metrics import UNUSED_SHARE

__all__ = ["Collapse", "Growth", "LossTrouble", "Verdict", "find_collapse", "judge"]

State = Literal["trained", "warned", "failed", "unknown"]

GROWTH_PROBES = 8
"""Probes over which a growth of sigma_1(Wq^T Wk) is looked for."""

GROWTH_WORTH_SAYING = 2.0

GIVEN_BACK = 0.2
"""A loss that ends above its best is lost only if it gave back this share of what it had gained:
a loss near zero is never within 10 % of its best for long."""


class Collapse(NamedTuple):
    """The first head whose attention became sparse and stayed so.

    Attributes:
        step: of the probe that saw it first.
        layer: name of the layer.
        head: its number.
        is_malignant: low rank too; otherwise the map is close to the identity.
        share: entropy over its largest possible value then.
        rank: of the map, 0 to 1; NaN where it was not recorded.
        num_heads: how many heads are so at the last probe.
        total_heads: of how many.
    """

    step: int
    layer: str
    head: int
    is_malignant: bool
    share: float
    rank: float
    num_heads: int
    total_heads: int


class Growth(NamedTuple):
    """How sigma_1(Wq^T Wk) of a head grew fastest up to a step."""

    factor: float
    first_step: int
    last_step: int
    before: float
    after: float


class LossTrouble(NamedTuple):
    """Where the loss left its course, and how: "nonfinite", "lost" or "stalled"."""

    kind: Literal["nonfinite", "lost", "stalled"]
    step: int


@dataclass(frozen=True)
class Verdict:
    """The judgement of a run.

    Attributes:
        state: "failed", "warned" (something to look at, but the loss came down), "trained", or
            "unknown" where there is too little to go by.
        headline: a few words.
        sentences: what was seen, in order.
        divergence_step: step at which the loss left its course, or None.
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
    alarms = [event for event in run.events if event.name == "alarm"]
    sentences = [
        *_about_loss(run, trouble),
        *_about_collapse(run, collapse, trouble),
        *_about_unused(run),
        *_about_events(run),
    ]
    if trouble is not None:
        sentences += _advice(run, trouble, collapse)
    state: State
    if trouble is not None:
        state, headline = "failed", _failure(trouble, collapse)
    elif not _finite_losses(run):
        state, headline = "unknown", "Nothing to judge by: no finite loss was recorded"
    elif alarms:
        state, headline = "warned", f"Trained on after {_count(len(alarms), 'alarm')}"
    elif collapse is not None:
        kind = "malignant" if collapse.is_malignant else "benign"
        state, headline = "warned", f"Trained, with a {kind} collapse of attention to look at"
    else:
        watched = any("entropy_normalised" in p.quantities for p in run.probes)
        calm = "attention did not collapse" if watched else "attention was not watched"
        state, headline = "trained", f"Trained; {calm}"
    return Verdict(state, headline, tuple(sentences), trouble.step if trouble else None)


def find_collapse(run: RunRecords, limits: Thresholds) -> Collapse | None:
    """Find the first head that becomes sparse and is so at every later probe.

    A head that is sparse at the first probe was so before this run, and is left out. Malignant
    ones go before benign ones.
    """
    history: dict[tuple[str, int], list[tuple[int, float, float]]] = {}
    for probe in run.probes:
        shares = probe.quantities.get("entropy_normalised", {})
        ranks = probe.quantities.get("rank", {})
        for layer, values in shares.items():
            for head, value in enumerate(values if isinstance(values, list) else []):
                entry = probe.step, to_number(value), _entry(ranks.get(layer), head)
                history.setdefault((layer, head), []).append(entry)
    found = []
    for (layer, head), seen in history.items():
        known = [entry for entry in seen if math.isfinite(entry[1])]
        stretch = _last_stretch([share < limits.entropy_share for _, share, _ in known])
        if not stretch:  # not sparse at the end, or from the beginning
            continue
        step, share, rank = known[stretch]
        later = [entry[2] for entry in known[stretch:] if math.isfinite(entry[2])]
        malignant = bool(later) and later[-1] < limits.rank_share
        found.append((not malignant, step, share, layer, head, rank))
    if not found:
        return None
    benign, step, share, layer, head, rank = min(found)
    same = sum(entry[0] == benign for entry in found)
    return Collapse(step, layer, head, not benign, share, rank, same, len(history))


def find_growth(run: RunRecords, layer: str, head: int, until: int) -> Growth | None:
    """Find the fastest growth of a head's sigma_1(Wq^T Wk) within a few probes, up to a step."""
    values = [
        (probe.step, _entry(probe.quantities.get("sigma_qk", {}).get(layer), head))
        for probe in run.probes
        if probe.step <= until
    ]
    known = [(step, value) for step, value in values if math.isfinite(value) and value > 0]
    pairs = [
        Growth(after / before, first, last, before, after)
        for i, (first, before) in enumerate(known)
        for last, after in known[i + 1 : i + 1 + GROWTH_PROBES]
    ]
    return max(pairs, default=None)


def find_trouble(
    run: RunRecords, collapse: Collapse | None, limits: Thresholds
) -> LossTrouble | None:
    """Say where the loss left its course.

    It is "nonfinite" if the run ends with a NaN or infinite loss; "lost" where it never again comes
    within 10 % of its best and has given back a good part of what it had gained; "stalled" where a
    malignant collapse goes with a loss that has hardly come down. Without a collapse, a loss that
    hardly moves is no trouble: it may have been low from the start.
    """
    losses = run.losses
    values = [value for _, value in losses]
    bad = _last_stretch([not math.isfinite(value) for value in values])
    if bad is not None:
        return LossTrouble("nonfinite", losses[bad][0])
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    first = median(finite[: max(1, min(SMOOTHING, len(finite) // 4))])
    lost, levels = lost_step(values), smooth(values)
    best = min(levels)
    if lost is not None and levels[-1] - best > GIVEN_BACK * (first - best):
        return LossTrouble("lost", losses[lost - 1][0])
    if collapse is not None and collapse.is_malignant and min(finite) > limits.learnt * first:
        return LossTrouble("stalled", collapse.step)
    return None


def _last_stretch(flags: Sequence[bool]) -> int | None:
    """Return where the run of true flags at the end begins, or None if the last is false."""
    if not flags or not flags[-1]:
        return None
    start = len(flags)
    while start and flags[start - 1]:
        start -= 1
    return start


def _entry(values: object, head: int) -> float:
    if not isinstance(values, list) or head >= len(values):
        return math.nan
    return to_number(values[head])


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
    sentences = [
        f"Collapse of attention began at step {collapse.step} in "
        f"{_where(run, collapse.layer, collapse.head)}: {kind} ({shape}), entropy at "
        f"{collapse.share:.0%} of its largest possible value{rank}; in the end "
        f"{collapse.num_heads} of {_count(collapse.total_heads, 'head')}."
    ]
    growth = find_growth(run, collapse.layer, collapse.head, collapse.step)
    if growth is not None and growth.factor >= GROWTH_WORTH_SAYING:
        sentences.append(
            f"There sigma1(Wq^T Wk) grew {growth.factor:.3g} x in "
            f"{_count(growth.last_step - growth.first_step, 'step')}, from {growth.before:.3g} "
            f"(step {growth.first_step}) to {growth.after:.3g} (step {growth.last_step})."
        )
    if trouble is None:
        harmless = "The loss did not suffer from it"
        return [*sentences, harmless + (": sparse attention alone does no harm.")]
    if trouble.kind == "stalled":
        return [*sentences, "The loss has stood still since."]
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
    for event in run.events:
        found = event.values
        if event.name == "alarm":
            layer, head = found.get("layer"), found.get("head")
            where = f" in {_where(run, layer, head)}" if isinstance(layer, str) else ""
            reason = f": {found['reason']}" if found.get("reason") else ""
            sentences.append(
                f"Alarm at step {event.step}, {found.get('kind', 'unknown')}{where}{reason}."
            )
        elif event.name == "rollback":
            sentences.append(
                f"At step {event.step} training went back to step {found.get('to_step', '?')}, to "
                f"go on at {to_number(found.get('lr_scale')):g} times the learning rate."
            )
        else:
            sentences.append(f"Training was stopped at step {event.step}: {found.get('reason')}.")
    return sentences


def _failure(trouble: LossTrouble, collapse: Collapse | None) -> str:
    what = {
        "nonfinite": f"Failed: the loss is not finite from step {trouble.step} on",
        "lost": f"Failed: the loss was lost at step {trouble.step}",
        "stalled": "Failed: the loss hardly came down",
    }[trouble.kind]
    if collapse is None or not collapse.is_malignant:
        return what
    if trouble.kind != "stalled" and collapse.step > trouble.step:
        return what
    return f"{what}, after attention collapsed at step {collapse.step}"


def _advice(run: RunRecords, trouble: LossTrouble, collapse: Collapse | None) -> list[str]:
    if collapse is None or collapse.step > trouble.step:
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

"""What a preflight found: the margin of the planned rate, and what each remedy buys."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from hf_stable.commands.preflight.judging import Outcome
from hf_stable.commands.preflight.legs import Settings
from hf_stable.commands.preflight.remedies import NONE, Remedy

__all__ = ["ENOUGH", "PreflightResult", "RemedyResult", "conclude"]

ENOUGH = 2.0
"""A planned rate has margin enough if this many times it survives as well."""


@dataclass(frozen=True)
class RemedyResult:
    """What a remedy came to over all seeds.

    Attributes:
        remedy: which.
        survives_to: highest multiple of the planned rate that survived, with every lower one that
            was tried, under every seed; None if not even the lowest did.
        fails_at: lowest multiple that did not survive; None if all did.
        refused: why it cannot be used here, or "".
        loss: median over seeds of the last loss at the planned rate; None where it is not finite.
        time: seconds per step over those of the run as planned, at the planned rate; or None.
    """

    remedy: Remedy
    survives_to: float | None
    fails_at: float | None
    refused: str
    loss: float | None
    time: float | None

    @property
    def margin(self) -> float:
        """Return the highest multiple that survives, 0 for none."""
        return self.survives_to or 0.0


@dataclass(frozen=True)
class PreflightResult:
    """All of a preflight.

    Attributes:
        settings: of its legs.
        outcomes: one per leg.
        remedies: one row each; the run as planned first.
        rate: the learning rate that the run plans.
        tau: what AdamW2's `tau=auto` is for the run; None if that is not known.
        sentences: the paragraph.
        command: what to start the run with; "" where a function makes the Trainer.
        passed: whether the planned run has margin enough.
    """

    settings: Settings
    outcomes: tuple[Outcome, ...]
    remedies: tuple[RemedyResult, ...]
    rate: float
    tau: float | None
    sentences: tuple[str, ...]
    command: str
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `preflight.json` holds it."""
        rows = [
            {
                "remedy": row.remedy.name,
                "survives_to": row.survives_to,
                "fails_at": row.fails_at,
                "refused": row.refused,
                "loss": row.loss,
                "time": row.time,
            }
            for row in self.remedies
        ]
        return {
            "settings": asdict(self.settings),
            "passed": self.passed,
            "learning_rate": self.rate,
            "tau": self.tau,
            "remedies": rows,
            "legs": [outcome.to_dict() for outcome in self.outcomes],
            "sentences": list(self.sentences),
            "command": self.command,
        }


def conclude(outcomes: Sequence[Outcome], settings: Settings) -> PreflightResult:
    """Draw the conclusions from what became of all legs.

    Args:
        outcomes: as `run_legs` returns them; the planned run is among them.
        settings: of the legs.
    """
    outcomes = _undecided_as_training(outcomes)
    planned = next(o for o in outcomes if o.leg.remedy == NONE and o.leg.factor == 1)
    facts = dict(planned.ending.facts or {}) if planned.ending is not None else {}
    rate = float(facts.get("first_rate") or facts.get("learning_rate") or math.nan)
    remedies = list(dict.fromkeys(outcome.leg.remedy for outcome in outcomes))
    time = planned.ending.seconds_per_step if planned.ending is not None else None
    rows = tuple(
        _sum_up(remedy, [o for o in outcomes if o.leg.remedy == remedy], time)
        for remedy in remedies
    )
    passed = rows[0].margin >= ENOUGH
    best = None if passed else _choose(rows)
    sentences = [_about_plan(rows[0], planned, rate, settings)]
    sentences += [_about_remedy(row, rows[0]) for row in rows[1:]]
    sentences += _about_tau(rows, facts)
    sentences += _advice(rows[0], best, rate, outcomes)
    command = _command(settings, best.remedy if best is not None else NONE)
    tau = facts.get("tau")
    return PreflightResult(
        settings, tuple(outcomes), rows, rate, tau, tuple(sentences), command, passed
    )


def _undecided_as_training(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return outcomes in which a loss that stands still counts only if another leg's moved.

    Where no leg's loss has moved, the steps were too few to see it move, and that is said.
    """
    if any(outcome.survives for outcome in outcomes):
        return list(outcomes)
    reason = "the loss of no leg has moved yet"
    return [replace(o, kind="trains", reason=reason) if o.kind == "stalls" else o for o in outcomes]


def _sum_up(remedy: Remedy, outcomes: Sequence[Outcome], planned: float | None) -> RemedyResult:
    refused = next((o.reason for o in outcomes if o.kind == "refused"), "")
    factors = sorted({o.leg.factor for o in outcomes if o.kind != "refused"})
    bad = [o.leg.factor for o in outcomes if not o.survives and o.kind != "refused"]
    fails_at = min(bad, default=None)
    good = [f for f in factors if fails_at is None or f < fails_at]
    own = [o for o in outcomes if o.leg.factor == 1 and o.is_run]
    losses = [o.loss for o in own if o.loss is not None]
    times = [o.ending.seconds_per_step for o in own if o.ending and o.ending.seconds_per_step]
    return RemedyResult(
        remedy,
        survives_to=max(good, default=None),
        fails_at=fails_at,
        refused=refused,
        loss=median(losses) if losses else None,
        time=median(times) / planned if times and planned else None,
    )


def _choose(rows: Sequence[RemedyResult]) -> RemedyResult | None:
    """Return the remedy that buys enough at the lowest loss, or else the one that buys most."""
    usable = [row for row in rows[1:] if not row.refused and row.margin > rows[0].margin]
    enough = [row for row in usable if row.margin >= ENOUGH]
    if enough:
        return min(enough, key=lambda row: math.inf if row.loss is None else row.loss)
    return max(usable, key=lambda row: row.margin, default=None)


def _about_plan(row: RemedyResult, planned: Outcome, rate: float, settings: Settings) -> str:
    what = {
        "trains": "trains",
        "spikes": "trains, after a spike",
        "stalls": "does not bring its loss down",
        "diverges": "loses its loss",
        "nan": "ends in a loss that is not finite",
    }[planned.kind]
    text = f"The run as planned, at a rate of {rate:g}, {what} in its first {settings.steps} steps"
    if row.fails_at is not None and row.fails_at > 1:
        text += f"; it fails at {row.fails_at:g} times the rate"
    elif row.fails_at is None and row.margin > 1:
        text += f", and so it does at every rate tried, up to {row.margin:g} times"
    elif row.fails_at is not None and row.survives_to is not None:
        text += f"; it survives at {row.survives_to:g} times the rate"
    if planned.alarm is not None:
        where = f" in {planned.alarm['layer']}" if planned.alarm.get("layer") else ""
        text += f". Its first alarm, {planned.alarm['kind']}{where}, came at step "
        text += f"{planned.alarm['step']}"
    return text + "."


def _about_remedy(row: RemedyResult, plain: RemedyResult) -> str:
    if row.refused:
        return f"{row.remedy.name}: not usable here: {row.refused}."
    cost = "" if row.time is None else f", at {row.time:.2f} times the time per step"
    if row.survives_to is None:
        return f"{row.remedy.name}: fails at every rate tried{cost}."
    limit = f", fails at {row.fails_at:g}" if row.fails_at is not None else ", no rate tried fails"
    ends = [each.loss for each in (row, plain)]
    loss = ""
    if ends[0] is not None:
        against = "" if ends[1] is None else f" against {ends[1]:.3g}"
        loss = f"; loss at the planned rate {ends[0]:.3g}{against}"
    return f"{row.remedy.name}: survives {row.survives_to:g} times the rate{limit}{loss}{cost}."


def _about_tau(rows: Sequence[RemedyResult], facts: Mapping[str, Any]) -> list[str]:
    """Suggest a tau for the whole run, where AdamW2 is among what was tried."""
    tried = any(row.remedy.optim == "adamw2" and not row.refused for row in rows)
    if not tried or "tau" not in facts:
        return []
    steps = facts["max_steps"]
    return [f"For the {steps} steps of this run, AdamW2's tau=auto is tau={facts['tau']:.3g}."]


def _advice(
    plain: RemedyResult, best: RemedyResult | None, rate: float, outcomes: Sequence[Outcome]
) -> list[str]:
    if any(outcome.reason.startswith("the loss of no leg") for outcome in outcomes):
        return ["No leg's loss has moved yet: with more --steps this can be told apart."]
    if plain.margin >= ENOUGH:
        return ["Nothing is needed: the planned rate has a margin of two or more."]
    if plain.fails_at is None:
        return [
            "Whether the planned rate has a margin of two is not known: no rate of twice it or "
            "more was tried. Give one in --rates, such as 3."
        ]
    lower = [] if plain.survives_to is None else [plain.survives_to / ENOUGH]
    calmer = f"a rate of {lower[0] * rate:.2g} would have a margin of two" if lower else ""
    if best is None:
        return [f"No remedy that was tried helps; {calmer or 'try lower --rates'}."]
    if best.margin >= ENOUGH:
        rest = f" Without it, {calmer}." if calmer else ""
        return [f"Use {best.remedy.name}: with it the planned rate has a margin of two.{rest}"]
    rest = f"; without it, {calmer}" if calmer else ""
    return [f"{best.remedy.name} survives most, {best.margin:g} times the planned rate{rest}."]


def _command(settings: Settings, remedy: Remedy) -> str:
    if not settings.command:
        return ""
    launcher, script = remedy.command_options()
    if settings.launcher:
        words = [*settings.launcher, "-m", "hf_stable.run"]
    else:
        words = ["hf-stable", "run"]
    return shlex.join([*words, *launcher, *settings.command, *script])

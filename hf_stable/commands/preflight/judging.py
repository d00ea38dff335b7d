"""What became of a leg: the report's judgement of its records, in the words of a preflight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_stable.commands.preflight.legs import Ending, Leg, Settings, read_ending
from hf_stable.measures.loss_curves import smooth
from hf_stable.monitor.thresholds import Thresholds
from hf_stable.report.collapses import find_collapse
from hf_stable.report.reading import read_run
from hf_stable.report.run_records import RunRecords
from hf_stable.report.troubles import fault_of, find_trouble

__all__ = ["Kind", "Outcome", "judge_leg", "judge_records"]

Kind = Literal["trains", "spikes", "stalls", "diverges", "nan", "refused", "skipped"]

SURVIVING = ("trains", "spikes")
LOST = ("diverges", "nan")


@dataclass(frozen=True)
class Outcome:
    """What became of a leg.

    Attributes:
        leg: which.
        kind: "trains"; "spikes", with an alarm of a rise from which the loss came back; "stalls",
            where the loss hardly moves; "diverges"; "nan"; "refused" or "skipped", where the
            leg was not run for the reason in `reason`.
        reason: a sentence, or "".
        loss: median of the last losses; None without one that is finite.
        alarm: step, kind and place of the first alarm; None without one.
        folder: of the leg's records; None where there are none.
        ending: of the leg; None where it was not run.
    """

    leg: Leg
    kind: Kind
    reason: str = ""
    loss: float | None = None
    alarm: dict[str, Any] | None = None
    folder: Path | None = None
    ending: Ending | None = None

    @classmethod
    def skipped(cls, leg: Leg, reason: str) -> Outcome:
        """Return the outcome of a leg that is not run."""
        return cls(leg, "skipped", reason)

    @property
    def is_run(self) -> bool:
        """Say whether the leg has trained."""
        return self.kind not in ("refused", "skipped")

    @property
    def survives(self) -> bool:
        """Say whether the loss came down and stayed."""
        return self.kind in SURVIVING

    @property
    def is_lost(self) -> bool:
        """Say whether the loss left its course for good."""
        return self.kind in LOST

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        ending = self.ending
        return {
            "leg": self.leg.name,
            "remedy": self.leg.remedy.name,
            "factor": self.leg.factor,
            "seed": self.leg.seed,
            "outcome": self.kind,
            "reason": self.reason,
            "loss": self.loss,
            "first_alarm": self.alarm,
            "steps": 0 if ending is None else ending.steps,
            "seconds_per_step": None if ending is None else ending.seconds_per_step,
        }


def judge_leg(leg: Leg, folder: Path, settings: Settings) -> Outcome:
    """Judge a leg by what it left in its folder.

    Raises:
        ValueError: if the leg is not done.
    """
    ending = read_ending(folder, leg.key(settings))
    if ending is None:
        raise ValueError(f"{folder} does not hold the leg {leg.name!r}")
    if ending.end == "refused":
        return Outcome(leg, "refused", ending.reason, ending=ending)
    run = read_run(folder, leg.name)
    alarm = next((e for e in run.events if e.name == "alarm"), None)
    found = None
    if alarm is not None:
        found = {
            "step": alarm.step, "kind": alarm.kind, "layer": alarm.layer or None,
            "head": alarm.head, "reason": alarm.reason,
        }  # fmt: skip
    kind = judge_records(run)
    return Outcome(leg, kind, loss=_last_level(run), alarm=found, folder=folder, ending=ending)


def judge_records(run: RunRecords, thresholds: Thresholds | None = None) -> Kind:
    """Say in one word what became of a run, by the rules of the report's verdict."""
    limits = thresholds or Thresholds()
    trouble = find_trouble(run, find_collapse(run, limits), limits)
    if trouble is not None:
        words: dict[str, Kind] = {"nonfinite": "nan", "lost": "diverges", "stalled": "stalls"}
        return words[trouble.kind]
    if fault_of(run):
        return "stalls"
    spiked = any(alarm.kind == "spike" for alarm in run.alarms)
    return "spikes" if spiked else "trains"


def _last_level(run: RunRecords) -> float | None:
    finite = [value for _, value in run.losses if math.isfinite(value)]
    return smooth(finite)[-1] if finite else None

"""What a preflight would have said of runs that were done in full, by their beginnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hf_stable.commands.preflight.judging import Outcome, judge_records
from hf_stable.commands.preflight.legs import Leg, Settings
from hf_stable.commands.preflight.remedies import NONE
from hf_stable.commands.preflight.result import conclude
from hf_stable.report.run_records import RunRecords

__all__ = ["judge_beginnings"]


def judge_beginnings(runs: Mapping[float, RunRecords], steps: int) -> dict[float, Outcome]:
    """Judge the first steps of runs as a preflight judges its legs.

    A leg is the beginning of the run, bit for bit. So the records of a run up to the last step of a
    leg are those of the leg, if they were written as often.

    Args:
        runs: by multiple of the planned rate; 1 is among them. They were logged at every step.
        steps: of the legs.

    Returns:
        The outcome at each multiple: `kind` says in one word what the leg did, `survives` whether
        its loss came down and stayed.

    Raises:
        ValueError: if the planned rate is missing, or a run has fewer steps than a leg.
    """
    if 1 not in runs:
        raise ValueError(
            "runs has no multiple 1, so there is no planned rate to judge the others by; its "
            f"multiples are {', '.join(f'{each:g}' for each in runs)}"
        )
    short = [factor for factor, run in runs.items() if run.num_steps < steps]
    if short:
        raise ValueError(
            f"the run at {short[0]:g} times the rate has {runs[short[0]].num_steps} steps, and the "
            f"legs are to have {steps}; give fewer"
        )
    legs = [
        Outcome(Leg(NONE, float(factor)), judge_records(_beginning(run, steps)))
        for factor, run in runs.items()
    ]
    # What a leg says whose loss stands still depends on the others.
    concluded = conclude(legs, Settings((), steps, every=1)).outcomes
    return dict(zip(runs, concluded, strict=True))


def _beginning(run: RunRecords, steps: int) -> RunRecords:
    """Return what a leg of so many steps leaves: nothing of later steps, and nothing of tests."""
    return replace(
        run,
        history=tuple(r for r in run.history if r["step"] <= steps and "loss" in r),
        probes=tuple(probe for probe in run.probes if probe.step <= steps),
        events=tuple(event for event in run.events if event.step <= steps),
        num_steps=steps,
    )

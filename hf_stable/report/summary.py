"""One row per run for a table: what it ended with, beside the rule's verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_stable.report.run_records import RunRecords
from hf_stable.report.values import worst_head
from hf_stable.report.verdict import Verdict, judge

__all__ = ["TABLE_COLUMNS", "RunSummary", "summarise", "table_cells"]

ACCURACIES = ("eval_accuracy", "eval_overall_accuracy", "test_accuracy", "predict_accuracy")
"""Names under which an accuracy is logged, the first that is there counts: run_ner.py has its own.
"""

TABLE_COLUMNS = (
    "run",
    "verdict",
    "steps",
    "last loss",
    "best loss",
    "accuracy",
    "min entropy (nats)",
    "max sigma1(Wq^T Wk)",
    "divergence step",
    "alarms",
    "rollbacks",
    "time",
)


@dataclass(frozen=True)
class RunSummary:
    """What a run comes to.

    Attributes:
        run: its name.
        verdict: the judgement.
        num_steps: optimizer steps done.
        max_steps: planned, or None.
        last_loss: the last training loss; NaN if it was not finite, None if there is none.
        best_loss: the lowest finite one.
        accuracy: the last evaluation's, or that of a test or prediction; None if none was logged.
        smallest_entropy: in nats, of any head at any probe.
        largest_sigma_qk: sigma_1(Wq^T Wk), of any head at any probe.
        alarms: how many.
        rollbacks: how many.
        seconds: of training, as the monitor measured over all legs of a run, or else as the
            Trainer did of the last one; None if neither is on disk.
    """

    run: str
    verdict: Verdict
    num_steps: int
    max_steps: int | None
    last_loss: float | None
    best_loss: float | None
    accuracy: float | None
    smallest_entropy: float | None
    largest_sigma_qk: float | None
    alarms: int
    rollbacks: int
    seconds: float | None


def summarise(run: RunRecords) -> RunSummary:
    """Return a run's row."""
    losses = [value for _, value in run.losses]
    times = [value for _, value in run.logged("train_runtime")]
    events = [event.name for event in run.events]
    return RunSummary(
        run=run.name,
        verdict=judge(run),
        num_steps=run.num_steps,
        max_steps=run.max_steps,
        last_loss=losses[-1] if losses else None,
        best_loss=min(filter(math.isfinite, losses), default=None),
        accuracy=_accuracy(run),
        smallest_entropy=min(_worst(run, "entropy"), default=None),
        largest_sigma_qk=max(_worst(run, "sigma_qk"), default=None),
        alarms=events.count("alarm"),
        rollbacks=events.count("rollback"),
        seconds=run.seconds if run.seconds is not None else times[-1] if times else None,
    )


def table_cells(summary: RunSummary) -> tuple[str, ...]:
    """Return the texts of a row, in the order of `TABLE_COLUMNS`; a dash for what is not known."""
    planned = f" of {summary.max_steps}" if summary.max_steps else ""
    divergence = summary.verdict.divergence_step
    return (
        summary.run,
        summary.verdict.state,
        f"{summary.num_steps}{planned}",
        _number(summary.last_loss),
        _number(summary.best_loss),
        "-" if summary.accuracy is None else f"{summary.accuracy:.1%}",
        _number(summary.smallest_entropy),
        _number(summary.largest_sigma_qk),
        "-" if divergence is None else str(divergence),
        str(summary.alarms),
        str(summary.rollbacks),
        "-" if summary.seconds is None else _duration(summary.seconds),
    )


def _accuracy(run: RunRecords) -> float | None:
    for key in ACCURACIES:
        found = [value for _, value in run.logged(key) if math.isfinite(value)]
        if found:
            return found[-1]
    return None


def _worst(run: RunRecords, quantity: str) -> Sequence[float]:
    return [
        value
        for probe in run.probes
        for heads in probe.quantities.get(quantity, {}).values()
        if math.isfinite(value := worst_head(quantity, heads)[0])
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if math.isfinite(value) else "NaN"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"

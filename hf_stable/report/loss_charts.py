"""The charts of what the Trainer logged: losses, evaluations, rates, norms of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_stable.report.charts import Chart, Curve, Section, make_chart
from hf_stable.report.run_records import RunRecords

__all__ = ["loss_section"]

NO_METRIC = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def loss_section(runs: Sequence[RunRecords]) -> Section:
    """Return one chart per quantity, with a curve per run."""
    charts = [
        make_chart(
            "Training loss",
            "loss (nats for cross-entropy)",
            [Curve(run.name, run.losses, i) for i, run in enumerate(runs)],
            missing="no run has a recorded loss",
        )
    ]
    keys = dict.fromkeys(key for run in runs for record in run.history for key in record)
    for key in keys:
        if key.startswith("eval_") and key.removeprefix("eval_") not in NO_METRIC[1:]:
            name = key.removeprefix("eval_").replace("_", " ")
            unit = {"accuracy": "accuracy (share of 1)"}.get(name, name)
            charts.append(_logged(runs, key, f"Evaluation: {name}", unit))
        elif "accuracy" in key:
            charts.append(_logged(runs, key, key.replace("_", " ").capitalize(), f"{key} (share)"))
    if "learning_rate" in keys:
        charts.append(_logged(runs, "learning_rate", "Learning rate, scheduled", "rate per step"))
    if "grad_norm" in keys:
        chart = _logged(runs, "grad_norm", "Gradient norm", "l2 norm over all gradients")
        charts.append(replace(chart, log=True))
    return Section(
        "loss",
        "Loss and accuracy",
        "Of evaluations and rates what the Trainer logged. Marks on the time axis are alarms, "
        "rollbacks, and where a curve stops being a finite number.",
        tuple(charts),
    )


def _logged(runs: Sequence[RunRecords], key: str, title: str, unit: str) -> Chart:
    curves = [Curve(run.name, run.logged(key), i) for i, run in enumerate(runs)]
    return make_chart(title, unit, curves, missing=f"no run logged {key}")

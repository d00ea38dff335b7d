"""What a report draws, as data: sections of charts, made from the records of runs.

The page and the image files are both made from this, so they show the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hf_stable.monitor.terms import Term, find_term, names_of
from hf_stable.report.charts import (
    ALL_RUNS,
    Chart,
    Curve,
    Section,
    finish,
    make_chart,
    marks_of,
    not_recorded,
    point_limit,
)
from hf_stable.report.concentration import concentration_section
from hf_stable.report.run_records import RunRecords, short_names, to_number, worst_head

__all__ = ["build_sections"]

OUTSIDE = "outside the blocks"

MOST_POINTS = 50_000
"""Points of all charts together, some 15 bytes each on the page; more make all curves coarser."""

NO_METRIC = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def build_sections(runs: Sequence[RunRecords]) -> list[Section]:
    """Return the sections of a report on these runs; sections without any curve say why."""
    sections = [
        _loss_section(runs),
        _entropy_section(runs),
        _spectra_section(runs),
        concentration_section(runs),
        _terms_section(runs),
        _rates_section(runs),
    ]
    marks = tuple(mark for number, run in enumerate(runs) for mark in marks_of(run, number))
    num_points = sum(
        min(len(curve.points), point_limit(chart, section.small))
        for section in sections
        for chart in section.charts
        for curve in chart.curves
    )
    share = min(1.0, MOST_POINTS / max(1, num_points))
    return [
        replace(
            section,
            charts=tuple(finish(chart, section.small, marks, share) for chart in section.charts),
        )
        for section in sections
    ]


def _loss_section(runs: Sequence[RunRecords]) -> Section:
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


def _entropy_section(runs: Sequence[RunRecords]) -> Section:
    charts = []
    if len(runs) > 1:
        charts.append(_compared(runs, "entropy", "Lowest head of all layers, every run", "nats"))
    for number, run in enumerate(runs):
        curves = _by_layer(run, number, "entropy")
        ceilings = _ceilings(run, number) if curves else []
        bounds = [
            replace(curve, label=f"{curve.label}: lower bound (Theorem 3.1)", style="dotted")
            for curve in _by_layer(run, number, "entropy_bound")
        ]
        charts.append(
            make_chart(
                _of_run("Lowest head of each layer", run, runs),
                "entropy (nats)",
                [*curves, *bounds, *ceilings],
                missing=not_recorded(run, "entropy"),
            )
        )
    return Section(
        "entropy",
        "Attention entropy",
        "Uniform attention is at the dashed ceiling, log T for T visible keys; attention to one "
        "key at zero. Dotted: Theorem 3.1's lower bound, where it was recorded. A head at the "
        "ceiling is unused, one near zero looks at one key only.",
        tuple(charts),
    )


def _spectra_section(runs: Sequence[RunRecords]) -> Section:
    charts = []
    for name in names_of(section="spectra"):
        term = find_term(name)
        if not term.default and not any(_by_layer(run, 0, name) for run in runs):
            continue
        if len(runs) > 1:
            title = f"{term.title}: worst head, every run"
            charts.append(replace(_compared(runs, name, title, term.unit), log=term.log_scale))
        for number, run in enumerate(runs):
            chart = make_chart(
                _of_run(f"{term.title}: worst head of each layer", run, runs),
                term.unit,
                _by_layer(run, number, name),
                missing=not_recorded(run, name),
            )
            charts.append(replace(chart, log=term.log_scale))
    return Section(
        "spectra",
        "Spectra of Wq\u1d40Wk",
        "A share of energy near 1 with a growing \u03c3\u2081 is what a collapsing head shows. "
        "Near 1 alone means little: a small initialisation has it too.",
        tuple(charts),
    )


def _terms_section(runs: Sequence[RunRecords]) -> Section:
    charts = []
    if len(runs) > 1:
        for term in _block_terms():
            chart = _compared(runs, term.name, _block_title(term), term.unit)
            charts.append(replace(chart, variant=ALL_RUNS, log=term.log_scale))
    for number, run in enumerate(runs):
        for term in _block_terms():
            chart = make_chart(
                _block_title(term),
                term.unit,
                _by_layer(run, number, term.name),
                missing=not_recorded(run, term.name),
            )
            charts.append(replace(chart, variant=run.name, log=term.log_scale))
    return Section(
        "terms",
        "Fifteen terms of each block",
        "Largest singular values of the weights and of their products, l2 norms of gains, biases, "
        "of the block's input x and of the loss's gradient there (Qi et al. 2025, Eq. 1); one line "
        "per block, logarithmic.",
        tuple(charts),
        small=True,
    )


def _block_terms() -> list[Term]:
    """Return the fifteen terms of Eq. 1 and Figure 1 (Qi et al. 2025), in its order."""
    return [find_term(name) for name in names_of(section="terms")]


def _block_title(term: Term) -> str:
    return f"{term.title}, largest head" if term.per == "head" else term.title


def _rates_section(runs: Sequence[RunRecords]) -> Section:
    charts: list[Chart] = []
    for number, run in enumerate(runs):
        panels: dict[str, list[Curve]] = {}
        for name in dict.fromkeys(name for probe in run.probes for name in probe.rates):
            if not name.endswith(".weight"):
                continue
            layer = next((each for each in run.layers if name.startswith(f"{each}.")), None)
            points = _segments(
                [
                    (probe.attempt, probe.step, worst_head("effective_lr", probe.rates[name])[0])
                    for probe in run.probes
                    if name in probe.rates
                ]
            )
            if layer is None:
                curve = Curve(name.removesuffix(".weight"), points, number)
                panels.setdefault(OUTSIDE, []).append(curve)
            else:
                label = f"layer {short_names(run.layers)[layer]}"
                panel = name.removeprefix(f"{layer}.").removesuffix(".weight")
                curve = Curve(label, points, number, run.layers.index(layer))
                panels.setdefault(panel, []).append(curve)
        scheduled = Curve("scheduled", run.logged("learning_rate"), number, style="dashed")
        for panel, curves in sorted(panels.items(), key=lambda item: item[0] == OUTSIDE):
            with_schedule = [*curves, scheduled] if scheduled.points else curves
            charts.append(
                replace(
                    make_chart(panel, "rate per step", with_schedule, missing=""),
                    variant=run.name,
                    log=True,
                )
            )
        if not panels:
            text = "no effective rates: they are recorded of AdamW2 (optim='adamw2') only"
            charts.append(replace(make_chart(run.name, "", [], missing=text), variant=run.name))
    charts.sort(key=lambda chart: bool(chart.missing))  # a reader sees the first form first
    return Section(
        "rates",
        "Effective learning rate of each matrix",
        "The rate that AdamW2 really used, one line per block; dashed the scheduled one. Where a "
        "line is below it, Rule 1 clipped (Qi et al. 2025, Figure 15). Rate per step, logarithmic.",
        tuple(charts),
        small=True,
    )


def _of_run(title: str, run: RunRecords, runs: Sequence[RunRecords]) -> str:
    return title if len(runs) == 1 else f"{run.name}: {title[0].lower()}{title[1:]}"


def _by_layer(run: RunRecords, number: int, quantity: str) -> list[Curve]:
    """Return one curve per layer: its worst head."""
    names = short_names(run.layers)
    curves = [
        Curve(f"layer {names[layer]}", _segments(run.probed(quantity, layer)), number, position)
        for position, layer in enumerate(run.layers)
    ]
    # A block without a parameter (beta of an RMSNorm) has no curve rather than one of NaN.
    return [curve for curve in curves if any(math.isfinite(y) for _, y in curve.points)]


def _segments(entries: Sequence[tuple[int, int, float]]) -> list[tuple[float, float]]:
    """Return points with a gap wherever training went back."""
    points: list[tuple[float, float]] = []
    attempt = entries[0][0] if entries else 0
    for number, step, value in entries:
        if number != attempt:
            points.append((step - 0.5, math.nan))
            attempt = number
        points.append((step, value))
    return points


def _compared(runs: Sequence[RunRecords], quantity: str, title: str, unit: str) -> Chart:
    """Return a chart with one curve per run: the worst head of all its layers."""
    curves = []
    for number, run in enumerate(runs):
        entries = [
            (probe.attempt, probe.step, worst_head(quantity, values)[0])
            for probe in run.probes
            if (
                values := [
                    worst_head(quantity, value)[0]
                    for value in probe.quantities.get(quantity, {}).values()
                ]
            )
        ]
        curves.append(Curve(run.name, _segments(entries), number))
    return make_chart(title, unit, curves, missing=f"no run recorded {quantity}")


def _ceilings(run: RunRecords, number: int) -> list[Curve]:
    """Return the largest possible entropy of the layers, one line where it is the same for all.

    entropy / entropy_normalised is log T exactly where all rows see T keys; otherwise (causal,
    padded) the most uniform head gives the mean of log T over rows most closely.
    """
    found: dict[str, float] = {}
    for layer in run.layers:
        best = (0.0, math.nan)
        for probe in run.probes:
            entropies = probe.quantities.get("entropy", {}).get(layer)
            shares = probe.quantities.get("entropy_normalised", {}).get(layer)
            if isinstance(entropies, list) and isinstance(shares, list):
                for pair in zip(entropies, shares, strict=False):
                    entropy, share = map(to_number, pair)
                    if best[0] < share < math.inf and math.isfinite(entropy):
                        best = share, entropy / share
        if best[0] > 0:
            found[layer] = best[1]
    values = sorted(set(found.values()))
    if not values:
        return []
    steps = [probe.step for probe in run.probes]
    if values[-1] - values[0] <= 0.01 * values[-1]:
        value = values[-1]
        points = [(min(steps), value), (max(steps), value)]
        return [Curve(f"ceiling, log T = {value:.3g}", points, number, style="dashed")]
    names = short_names(run.layers)
    return [
        Curve(
            f"layer {names[layer]}: ceiling, log T = {value:.3g}",
            [(min(steps), value), (max(steps), value)],
            number,
            run.layers.index(layer),
            style="dashed",
        )
        for layer, value in found.items()
    ]

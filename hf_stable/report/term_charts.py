"""Small multiples: the fifteen terms of each block, and the rates that AdamW2 used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hf_stable.monitor.terms import Term, find_term, names_of
from hf_stable.report.charts import ALL_RUNS, Chart, Curve, Section, make_chart, not_recorded
from hf_stable.report.curves import compare_runs, layer_curves, segments
from hf_stable.report.run_records import RunRecords
from hf_stable.report.values import worst_head

__all__ = ["rates_section", "terms_section"]

OUTSIDE = "outside the blocks"


def terms_section(runs: Sequence[RunRecords]) -> Section:
    """Return a panel per term, with a curve per block; of several runs one that compares too."""
    charts = []
    if len(runs) > 1:
        for term in _block_terms():
            chart = compare_runs(runs, term.name, _block_title(term), term.unit)
            charts.append(replace(chart, variant=ALL_RUNS, log=term.log_scale))
    for number, run in enumerate(runs):
        for term in _block_terms():
            chart = make_chart(
                _block_title(term),
                term.unit,
                layer_curves(run, number, term.name),
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


def rates_section(runs: Sequence[RunRecords]) -> Section:
    """Return for each run a panel per kind of weight, with the rate of each block's."""
    charts = [chart for number, run in enumerate(runs) for chart in _rate_charts(run, number)]
    charts.sort(key=lambda chart: bool(chart.missing))  # a reader sees the first form first
    return Section(
        "rates",
        "Effective learning rate of each matrix",
        "The rate that AdamW2 really used, one line per block; dashed the scheduled one. Where a "
        "line is below it, Rule 1 clipped (Qi et al. 2025, Figure 15). Rate per step, logarithmic.",
        tuple(charts),
        small=True,
    )


def _rate_charts(run: RunRecords, number: int) -> list[Chart]:
    panels: dict[str, list[Curve]] = {}
    names = run.short_names
    positions = {layer: position for position, layer in enumerate(run.layers)}
    for name in dict.fromkeys(name for probe in run.probes for name in probe.rates):
        if name.endswith(".weight"):
            weight, points = name.removesuffix(".weight"), _rates(run, name)
            layer = _layer_of(weight, positions)
            if layer is None:
                panels.setdefault(OUTSIDE, []).append(Curve(weight, points, number))
            elif layer in run.drawn_layers:
                curve = Curve(f"layer {names[layer]}", points, number, positions[layer])
                panels.setdefault(weight.removeprefix(f"{layer}."), []).append(curve)
    if not panels:
        text = "no effective rates: they are recorded of AdamW2 (optim='adamw2') only"
        return [replace(make_chart(run.name, "", [], missing=text), variant=run.name)]
    scheduled = Curve("scheduled", run.logged("learning_rate"), number, style="dashed")
    return [
        replace(
            make_chart(panel, "rate per step", [*curves, scheduled], missing=""),
            variant=run.name,
            log=True,
        )
        for panel, curves in sorted(panels.items(), key=lambda item: item[0] == OUTSIDE)
    ]


def _rates(run: RunRecords, name: str) -> list[tuple[float, float]]:
    return segments(
        [
            (probe.attempt, probe.step, worst_head("effective_lr", probe.rates[name])[0])
            for probe in run.probes
            if name in probe.rates
        ]
    )


def _layer_of(weight: str, layers: Mapping[str, int]) -> str | None:
    """Return the layer that holds a weight; of layers within layers the outermost."""
    parts = weight.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in layers), None)

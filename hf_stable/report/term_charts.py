"""Small multiples: the fifteen terms of each block, and the rates that AdamW2 used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hf_stable.report.charts import ALL_RUNS, Chart, Curve, Section, make_chart, not_recorded
from hf_stable.report.curves import compare_runs, layer_curves, segments
from hf_stable.report.run_records import RunRecords, short_names
from hf_stable.report.values import worst_head

__all__ = ["rates_section", "terms_section"]

BLOCK_TERMS = (
    ("sigma_wq", "\u03c3\u2081(Wq)"),
    ("sigma_wk", "\u03c3\u2081(Wk)"),
    ("sigma_wv", "\u03c3\u2081(Wv)"),
    ("sigma_wo", "\u03c3\u2081(Wo)"),
    ("sigma_w1", "\u03c3\u2081(W1)"),
    ("sigma_w2", "\u03c3\u2081(W2)"),
    ("sigma_qk", "\u03c3\u2081(Wq\u1d40Wk), largest head"),
    ("sigma_ov", "\u03c3\u2081(Wo Wv), largest head"),
    ("sigma_w2w1", "\u03c3\u2081(W2 W1)"),
    ("norm_gamma1", "\u2016\u03b31\u2016, gain of norm 1"),
    ("norm_beta1", "\u2016\u03b21\u2016, bias of norm 1"),
    ("norm_gamma2", "\u2016\u03b32\u2016, gain of norm 2"),
    ("norm_beta2", "\u2016\u03b22\u2016, bias of norm 2"),
    ("norm_x", "\u2016x\u2016, input of the block"),
    ("norm_dx", "\u2016\u2202L/\u2202x\u2016, its gradient"),
)
"""The fifteen terms of Eq. 1 and Figure 1 (Qi et al. 2025), in its order."""

OUTSIDE = "outside the blocks"


def terms_section(runs: Sequence[RunRecords]) -> Section:
    """Return a panel per term, with a curve per block; of several runs one that compares too."""
    charts = []
    if len(runs) > 1:
        for quantity, title in BLOCK_TERMS:
            chart = compare_runs(runs, quantity, title, _term_unit(quantity))
            charts.append(replace(chart, variant=ALL_RUNS, log=True))
    for number, run in enumerate(runs):
        for quantity, title in BLOCK_TERMS:
            chart = make_chart(
                title,
                _term_unit(quantity),
                layer_curves(run, number, quantity),
                missing=not_recorded(run, quantity),
            )
            charts.append(replace(chart, variant=run.name, log=True))
    return Section(
        "terms",
        "Fifteen terms of each block",
        "Largest singular values of the weights and of their products, l2 norms of gains, biases, "
        "of the block's input x and of the loss's gradient there (Qi et al. 2025, Eq. 1); one line "
        "per block, logarithmic.",
        tuple(charts),
        small=True,
    )


def _term_unit(quantity: str) -> str:
    return "l2 norm" if quantity.startswith("norm_") else "singular value"


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
    names = short_names(run.layers)
    positions = {layer: position for position, layer in enumerate(run.layers)}
    for name in dict.fromkeys(name for probe in run.probes for name in probe.rates):
        if name.endswith(".weight"):
            weight, points = name.removesuffix(".weight"), _rates(run, name)
            layer = _layer_of(weight, positions)
            if layer is None:
                panels.setdefault(OUTSIDE, []).append(Curve(weight, points, number))
            else:
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

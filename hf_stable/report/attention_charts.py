"""The charts of attention: entropy of its heads, and spectra of Wq^T Wk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hf_stable.monitor.terms import find_term, names_of
from hf_stable.report.charts import Curve, Section, make_chart, not_recorded
from hf_stable.report.curves import compare_runs, layer_curves, title_of
from hf_stable.report.run_records import RunRecords
from hf_stable.report.values import to_number

__all__ = ["entropy_section", "spectra_section"]


def entropy_section(runs: Sequence[RunRecords]) -> Section:
    """Return the entropy of each layer beside the largest possible one, a chart per run."""
    charts = []
    if len(runs) > 1:
        charts.append(compare_runs(runs, "entropy", "Lowest head of all layers, every run", "nats"))
    for number, run in enumerate(runs):
        curves = layer_curves(run, number, "entropy")
        ceilings = _ceilings(run, number) if curves else []
        bounds = [
            replace(curve, label=f"{curve.label}: lower bound (Theorem 3.1)", style="dotted")
            for curve in layer_curves(run, number, "entropy_bound")
        ]
        charts.append(
            make_chart(
                title_of("Lowest head of each layer", run, runs),
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


def spectra_section(runs: Sequence[RunRecords]) -> Section:
    """Return concentration, norm and stable rank of Wq^T Wk of each layer, charts of each run."""
    charts = []
    for name in names_of(section="spectra"):
        term = find_term(name)
        if not term.default and not any(layer_curves(run, 0, name) for run in runs):
            continue
        if len(runs) > 1:
            title = f"{term.title}: worst head, every run"
            charts.append(replace(compare_runs(runs, name, title, term.unit), log=term.log_scale))
        for number, run in enumerate(runs):
            chart = make_chart(
                title_of(f"{term.title}: worst head of each layer", run, runs),
                term.unit,
                layer_curves(run, number, name),
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


def _ceilings(run: RunRecords, number: int) -> list[Curve]:
    """Return the largest possible entropy of the layers, one line where it is the same for all.

    entropy / entropy_normalised is log T exactly where all rows see T keys; otherwise (causal,
    padded) the most uniform head gives the mean of log T over rows most closely.
    """
    found: dict[str, float] = {}
    for layer in run.drawn_layers:
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
    names = run.short_names
    return [
        Curve(
            f"layer {names[layer]}: ceiling, log T = {value:.3g}",
            [(min(steps), value), (max(steps), value)],
            number,
            run.drawn_layers[layer],
            style="dashed",
        )
        for layer, value in found.items()
    ]

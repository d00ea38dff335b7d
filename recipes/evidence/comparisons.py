"""Claims 7 to 11: robustness, ablations, generalisation, sharpness, and what users pick instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from recipes.evidence.claim import Claim, Results, Verdict, losses, of
from recipes.evidence.runs import ADAMW2, GPT2, SIGMA, STD_VIT, SWIN, VIT, Variant

SHORT = 150
"""Steps of a run where there are many."""

# 7

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MIDDLE = 3e-3
SWEEP: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, warmup": dict(warmup=0.2),
    "AdamW2": ADAMW2,
    "sigmaReparam": SIGMA,
    "both": ADAMW2 | SIGMA,
}
OTHERS: dict[str, dict[str, Any]] = {
    "init x 1/4": dict(init_scale=0.25),
    "init x 4": dict(init_scale=4.0),
    "batch 8": dict(batch_size=8),
    "batch 128": dict(batch_size=128),
}


def sweep_name(method: str, rate: float, change: str = "") -> str:
    """Return the name of a run of the sweep."""
    return f"{method}, lr {rate:g}" + (f", {change}" if change else "")


def _robustness_variants() -> tuple[Variant, ...]:
    sweep = replace(VIT, steps=SHORT, monitor_every=0)
    found = [
        Variant(sweep_name(method, rate), replace(sweep, learning_rate=rate, **changes))
        for method, changes in SWEEP.items()
        for rate in RATES
    ]
    found += [
        Variant(
            sweep_name(method, MIDDLE, other),
            replace(sweep, learning_rate=MIDDLE, **changes, **change),
        )
        for method, changes in SWEEP.items()
        for other, change in OTHERS.items()
    ]
    return tuple(found)


def _width(rates: Sequence[float]) -> float:
    return max(rates) / min(rates) if rates else 0.0


def _judge_robustness(results: Results) -> Verdict:
    near, trained, parts = {}, {}, []
    for method in SWEEP:
        by_rate = {rate: mean(losses(results, sweep_name(method, rate))) for rate in RATES}
        best, reference = min(by_rate.values()), results[sweep_name(method, MIDDLE)][0]["reference"]
        close = [rate for rate, loss in by_rate.items() if loss <= best + 0.05 * reference]
        near[method] = _width(close)
        trained[method] = _width([rate for rate, loss in by_rate.items() if loss < reference / 2])
        changed = [
            mean(losses(results, sweep_name(method, MIDDLE, change))) for change in ("", *OTHERS)
        ]
        parts.append(
            f"{method} {near[method]:.3g} x, {trained[method]:.3g} x (best {best:.3g}; at 3e-3 "
            f"{min(changed):.3g} to {max(changed):.3g} over inits and batch sizes)"
        )
    sentence = (
        "width of the window of rates within 5 % of knowing nothing of the method's best loss, and "
        f"of those that at least halve the loss of knowing nothing: {'; '.join(parts)}. Rates "
        f"{RATES[0]:g} to {RATES[-1]:g}"
    )
    ours = ("AdamW2", "sigmaReparam", "both")
    wider = [sum(width[m] > width["AdamW"] for m in ours) for width in (near, trained)]
    verdict = "reproduced" if wider == [3, 3] else "partly" if any(wider) else "refuted"
    return verdict, sentence


# 8

ABLATED = {
    "ViT": (STD_VIT, "remove_pre_layernorm"),
    "Swin": (replace(SWIN, init="default", weight_decay=0.0), "remove_pre_layernorm"),
    "GPT-2": (replace(GPT2, init="default", weight_decay=0.0), "remove_pre_layernorm"),
    "BERT": (replace(GPT2, model="bert", init="default", weight_decay=0.0), "remove_layernorm"),
}
KINDS = ("norms", "no norms", "no norms, sigmaReparam")
ITERATIONS = (1, 2, 3, 5)
GRID_RATES, GRID_TAUS = (3e-3, 1e-2, 3e-2), (0.001, 0.004, 0.03)


def _ablation_variants() -> tuple[Variant, ...]:
    found = []
    for model, (settings, removal) in ABLATED.items():
        base = replace(settings, learning_rate=1e-3, steps=SHORT, monitor_every=0)
        for kind, methods in zip(KINDS, ("", removal, f"{removal},sigma_reparam"), strict=True):
            found.append(Variant(f"{model}, {kind}", replace(base, patch=methods)))
    for count in ITERATIONS:
        options = f"tau=0.004,power_iterations={count}"
        found.append(
            Variant(
                f"power iterations {count}",
                replace(VIT, optim="adamw2", optim_args=options, monitor_every=0),
            )
        )
    grid = replace(VIT, steps=SHORT, monitor_every=0, optim="adamw2")
    found += [
        Variant(
            f"grid, lr {rate:g}, tau {tau:g}",
            replace(grid, learning_rate=rate, optim_args=f"tau={tau}"),
        )
        for rate in GRID_RATES
        for tau in GRID_TAUS
    ]
    return tuple(found)


def _judge_ablations(results: Results) -> Verdict:
    def of_mean(name: str) -> str:
        value = mean(losses(results, name))
        return f"{value:.3g}" if math.isfinite(value) else "NaN"

    norms = "; ".join(
        f"{model} {' / '.join(of_mean(f'{model}, {kind}') for kind in KINDS)}" for model in ABLATED
    )
    seconds = {n: mean(r["seconds"] for r in results[f"power iterations {n}"]) for n in ITERATIONS}
    iterations = ", ".join(
        f"{n}: {of_mean(f'power iterations {n}')} ({seconds[n] / seconds[1]:.2f} x the time)"
        for n in ITERATIONS
    )
    rows = {
        tau: ", ".join(of_mean(f"grid, lr {rate:g}, tau {tau:g}") for rate in GRID_RATES)
        for tau in GRID_TAUS
    }
    grid = "; ".join(f"tau {tau:g}: {row}" for tau, row in rows.items())
    rates = ", ".join(f"{rate:g}" for rate in GRID_RATES)
    return "measured", (
        f"test loss with norms / without / without and with sigmaReparam at 1e-3: {norms}. Power "
        f"iterations of AdamW2: {iterations}; against depth see hf-stable bench adamw2. Grid at "
        f"rates {rates}: {grid}"
    )


# 9

NORMALISERS: dict[str, dict[str, Any]] = {
    "sigma": SIGMA,
    "frobenius": dict(normaliser="frobenius"),
    "weight norm": dict(normaliser="weight_norm"),
}
SCHEDULES = ("constant", "linear", "cosine")
SCHEDULED: dict[str, dict[str, Any]] = {"AdamW, warmup 10 %": dict(warmup=0.1), "AdamW2": ADAMW2}


def _open_question_variants() -> tuple[Variant, ...]:
    found = [
        Variant(f"{name}, lr {rate:g}", replace(STD_VIT, learning_rate=rate, **changes))
        for rate in (1e-3, 1e-2)
        for name, changes in ({"plain": {}} | NORMALISERS).items()
    ]
    for method, changes in SCHEDULED.items():
        for schedule in SCHEDULES:
            # transformers' constant schedule has no warmup; its other one is linear, then constant.
            named = "constant_with_warmup" if schedule == "constant" else schedule
            settings = replace(VIT, learning_rate=3e-3, lr_scheduler_type=named, **changes)
            found.append(Variant(f"{method}, {schedule}", settings))
    return tuple(found)


def _judge_open_questions(results: Results) -> Verdict:
    def shown(name: str) -> str:
        runs = results[name]
        return (
            f"{name}: {mean(losses(results, name)):.3g}, "
            f"{mean(r['calibration_error'] for r in runs):.2f}, "
            f"{mean(r['accuracy'] for r in runs):.2f} -> "
            f"{mean(r['noisy_accuracy'] for r in runs):.2f}"
        )

    sentence = "; ".join(map(shown, results))
    return "measured", (
        "mean test loss, calibration error, accuracy -> accuracy under noise of one standard "
        f"deviation: {sentence}"
    )


# 10


def _judge_sharpness(results: Results) -> Verdict:
    shares = {}
    for name, runs in results.items():
        shares[name] = [
            mean(p["sharpness"] > p["sharpness_threshold"] for p in found)
            for r in runs
            if (found := [p for p in r["probes"] if p.get("sharpness") and p["step"] > 5])
        ]
    sentence = "share of measurements above the threshold: " + ", ".join(
        f"{name} {mean(values):.2f}" for name, values in shares.items()
    )
    unstable, stable = (mean(shares[f"sharpness, {kind}"]) for kind in ("AdamW", "AdamW2"))
    return ("reproduced" if unstable > stable else "refuted"), sentence


# 11

RIVALS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, warmup 20 %": dict(warmup=0.2),
    "AdamW, clipped at 1": dict(max_grad_norm=1.0),
    "AdamW, QK-norm": dict(qk_norm=True, monitor_every=0),
    "StableAdamW": dict(optim="pytorch_optimizer:StableAdamW"),
    "StableSPAM": dict(optim="pytorch_optimizer:StableSPAM"),
    "AdamW2": ADAMW2,
    "sigmaReparam": SIGMA,
}


def _judge_rivals(results: Results) -> Verdict:
    parts, wins = [], 0
    for rate in (1e-2, 3e-2):
        by_method = {m: mean(losses(results, f"{m} at {rate:g}")) for m in RIVALS}
        order = sorted(by_method, key=lambda method: by_method[method])
        wins += order[0] in ("AdamW2", "sigmaReparam")
        parts.append(f"at {rate:g}: " + ", ".join(f"{m} {by_method[m]:.3g}" for m in order))
    verdict = ("we lose", "we win once", "we win")[wins]
    return verdict, "test loss, best first, " + "; ".join(parts)


CLAIMS = (
    Claim(
        "7", "Both widen the window of learning rates that train; and initialisations, batch sizes",
        _robustness_variants(), _judge_robustness,
    ),
    Claim(
        "8", "Norms removed on all four architectures; power iterations; a grid of rates and tau",
        _ablation_variants(), _judge_ablations,
    ),
    Claim(
        "9", "Other normalisers in sigma's place, schedules, calibration and noise",
        _open_question_variants(), _judge_open_questions,
    ),
    Claim(
        "10", "An unstable run is above the threshold of sharpness more often than a stable one",
        of(
            {
                f"sharpness, {kind}": replace(
                    VIT, learning_rate=3e-2, sharpness_every=25, **changes
                )
                for kind, changes in (("AdamW", {}), ("AdamW2", ADAMW2))
            }
        ),
        _judge_sharpness,
    ),
    Claim(
        "11", "Against what users would pick instead",
        of(
            {
                f"{method} at {rate:g}": replace(VIT, learning_rate=rate, **changes)
                for rate in (1e-2, 3e-2)
                for method, changes in RIVALS.items()
            }
        ),
        _judge_rivals,
    ),
)  # fmt: skip

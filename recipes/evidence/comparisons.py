"""Claims 7 to 11: robustness, ablations, generalisation, sharpness, and what users pick instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

from recipes.evidence import power_iterations
from recipes.evidence.claim import (
    WORSE,
    Claim,
    Figure,
    Panel,
    Results,
    Verdict,
    failures,
    losses,
    mostly_fails,
    of,
    short,
)
from recipes.evidence.from_the_papers import NO_NORMS, NO_NORMS_SIGMA
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


def window(by_rate: Mapping[float, float], limit: float) -> tuple[float, float] | None:
    """Return the lowest and the highest rate around the best one whose loss is within a limit.

    The loss is taken as linear in the logarithm of the rate between those that were tried, so that
    the width does not jump by their spacing.

    Args:
        by_rate: mean loss by rate, infinite ones too.
        limit: the highest loss that counts.

    Returns:
        None if the best loss is beyond the limit. An end that is the first or the last rate tried
        is one that the sweep cut off.
    """
    rates = sorted(by_rate)
    best = min(rates, key=lambda rate: by_rate[rate])
    if by_rate[best] > limit:
        return None

    def end(outwards: list[float]) -> float:
        for inner, outer in zip(outwards, outwards[1:], strict=False):
            if by_rate[outer] > limit:
                share = (limit - by_rate[inner]) / (by_rate[outer] - by_rate[inner])
                return inner * (outer / inner) ** share
        return outwards[-1]

    middle = rates.index(best)
    return end(rates[middle::-1]), end(rates[middle:])


def _window_text(found: tuple[float, float] | None) -> str:
    if found is None:
        return "none"
    low, high = found
    cut = ["below"] * (low == RATES[0]) + ["above"] * (high == RATES[-1])
    return f"{high / low:.2g} x" + (f" (cut off {' and '.join(cut)})" if cut else "")


def _judge_robustness(results: Results) -> Verdict:
    widths: dict[str, list[float]] = {}
    parts = []
    for method in SWEEP:
        by_rate = {rate: mean(losses(results, sweep_name(method, rate))) for rate in RATES}
        best, reference = min(by_rate.values()), results[sweep_name(method, MIDDLE)][0]["reference"]
        limits = (WORSE * best, best + 0.05 * reference, reference / 2)
        windows = [window(by_rate, limit) for limit in limits]
        widths[method] = [0.0 if w is None else w[1] / w[0] for w in windows]
        changed = [
            mean(losses(results, sweep_name(method, MIDDLE, change))) for change in ("", *OTHERS)
        ]
        parts.append(
            f"{method} {', '.join(map(_window_text, windows))} (best {short(best)}; at {MIDDLE:g} "
            f"{short(min(changed))} to {short(max(changed))} over inits and batch sizes)"
        )
    ours = ("AdamW2", "sigmaReparam", "both")
    wider = [sum(widths[m][i] > widths["AdamW"][i] for m in ours) for i in range(3)]
    sentence = (
        "width of the window of rates whose loss is within 5 % of the method's best, is within 5 % "
        "of knowing nothing of it, and is at most half of that of knowing nothing: "
        f"{'; '.join(parts)}. Rates {RATES[0]:g} to {RATES[-1]:g}, the loss linear in log rate "
        f"between them. Wider than AdamW without warmup: {wider[0]}, {wider[1]} and {wider[2]} of "
        f"the {len(ours)}"
    )
    if wider == [len(ours)] * 3:
        return "reproduced", sentence
    narrower = all(widths[m][i] < widths["AdamW"][i] for m in ours for i in range(3))
    if any(wider):
        return "partly", sentence
    return ("refuted" if narrower else "not at this scale"), sentence


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
        failed = failures(results, name)
        return short(mean(losses(results, name))) + (f" ({failed} fail)" if failed else "")

    norms = "; ".join(
        f"{model} {' / '.join(of_mean(f'{model}, {kind}') for kind in KINDS)}" for model in ABLATED
    )
    stalled = [model for model in ABLATED if mostly_fails(results, f"{model}, {KINDS[0]}")]
    iterations = ", ".join(f"{n}: {of_mean(f'power iterations {n}')}" for n in ITERATIONS)
    rows = {
        tau: ", ".join(of_mean(f"grid, lr {rate:g}, tau {tau:g}") for rate in GRID_RATES)
        for tau in GRID_TAUS
    }
    grid = "; ".join(f"tau {tau:g}: {row}" for tau, row in rows.items())
    rates = ", ".join(f"{rate:g}" for rate in GRID_RATES)
    return "measured", (
        f"test loss with norms / without / without and with sigmaReparam at 1e-3: {norms}; where "
        f"the model with norms fails itself ({', '.join(stalled) or 'nowhere'}) this says little. "
        f"Power iterations of AdamW2: {iterations}; time and accuracy against depth stand below. "
        f"Grid at rates {rates}: {grid}"
    )


# 9

NORMALISERS: dict[str, dict[str, Any]] = {
    "sigma": SIGMA,
    "frobenius": dict(normaliser="frobenius"),
    "weight norm": dict(normaliser="weight_norm"),
}
SCHEDULES: dict[str, Any] = {
    # transformers' constant schedule has no warmup; its other one is linear, then constant.
    "constant": dict(lr_scheduler_type="constant_with_warmup"),
    "linear": dict(lr_scheduler_type="linear"),
    "cosine": {},
    # At 60 % of the steps, to a tenth of the rate, which it reaches in one step.
    "step": dict(lr_scheduler_type="warmup_stable_decay"),
}
SCHEDULED: dict[str, dict[str, Any]] = {"AdamW, warmup 10 %": dict(warmup=0.1), "AdamW2": ADAMW2}
STEP_AT, STEP_TO = 0.6, 0.1


def _open_question_variants() -> tuple[Variant, ...]:
    found = [
        Variant(f"{name}, lr {rate:g}", replace(STD_VIT, learning_rate=rate, **changes))
        for rate in (1e-3, 1e-2)
        for name, changes in ({"plain": {}} | NORMALISERS).items()
    ]
    for method, changes in SCHEDULED.items():
        for schedule, scheduler in SCHEDULES.items():
            settings = replace(VIT, learning_rate=3e-3, **scheduler, **changes)
            if schedule == "step":
                stable = round((STEP_AT - settings.warmup) * settings.steps)
                options = dict(num_stable_steps=stable, num_decay_steps=1, min_lr_ratio=STEP_TO)
                settings = replace(settings, lr_scheduler_kwargs=options)
            found.append(Variant(f"{method}, {schedule}", settings))
    return tuple(found)


def _judge_open_questions(results: Results) -> Verdict:
    def shown(name: str) -> str:
        runs = results[name]
        text = f"{name}: {short(mean(losses(results, name)))}"
        if all("noisy_accuracy" in run for run in runs):
            accuracies = (mean(run[key] for run in runs) for key in ("accuracy", "noisy_accuracy"))
            errors = [run["calibration_error"] for run in runs]
            error = f"{mean(errors):.2f}" if None not in errors else "NaN"
            text += f" ({error}, {' -> '.join(f'{value:.2f}' for value in accuracies)})"
        return text

    sentence = "; ".join(map(shown, results))
    return "measured", (
        "mean test loss, and in brackets, where it was measured, calibration error and accuracy -> "
        f"accuracy under noise of one standard deviation: {sentence}"
    )


# 10

SPIKE_STEPS = 12
SPIKE = dict(
    steps=SPIKE_STEPS, monitor_every=1, sharpness_every=1, lr_scheduler_type="constant",
)  # fmt: skip
"""The first steps of a longer run, in which its schedule has hardly begun, each measured."""

SHARPNESS_PAIRS = (
    ("ViT, lr 3e-2, AdamW", "ViT, lr 3e-2, AdamW2"),
    ("ViT without block norms, plain", "ViT without block norms, sigmaReparam"),
)
SHARPNESS = {
    "ViT, lr 3e-2, AdamW": replace(VIT, learning_rate=3e-2, **SPIKE),
    "ViT, lr 3e-2, AdamW2": replace(VIT, learning_rate=3e-2, **ADAMW2, **SPIKE),
    "ViT without block norms, plain": replace(STD_VIT, patch=NO_NORMS, **SPIKE),
    "ViT without block norms, sigmaReparam": replace(STD_VIT, patch=NO_NORMS_SIGMA, **SPIKE),
}


def _judge_sharpness(results: Results) -> Verdict:
    parts, above, below = [], 0, 0
    for unstable, stable in SHARPNESS_PAIRS:
        shares = []
        for name in (unstable, stable):
            runs = results[name]
            share, scheduled = (mean(r[key] for r in runs) for key in ("above", "above_scheduled"))
            shares.append(share)
            first = ["never" if r["first_above"] is None else str(r["first_above"]) for r in runs]
            parts.append(
                f"{name} {share:.2f}, first at steps {', '.join(first)}"
                + (f" (by the scheduled rate {scheduled:.2f})" if scheduled != share else "")
            )
        above += shares[0] > shares[1]
        below += shares[0] < shares[1]
    sentence = (
        f"share of steps 2 to {SPIKE_STEPS} above the threshold of the rate that was used: "
        + "; ".join(parts)
    )
    pairs = len(SHARPNESS_PAIRS)
    if above:
        return ("reproduced" if above == pairs else "partly"), sentence
    return ("refuted" if below == pairs else "not at this scale"), sentence


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
OURS = ("AdamW2", "sigmaReparam")
RIVAL_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def _judge_rivals(results: Results) -> Verdict:
    by_rate = {
        f"at {rate:g}": {m: mean(losses(results, f"{m} at {rate:g}")) for m in RIVALS}
        for rate in RIVAL_RATES
    }
    tables = by_rate | {
        "best over rates": {m: min(row[m] for row in by_rate.values()) for m in RIVALS}
    }
    parts, outcomes = [], {}
    for where, by_method in tables.items():
        order = sorted(by_method, key=lambda method: by_method[method])
        ours = min(by_method[method] for method in OURS)
        theirs = min(loss for method, loss in by_method.items() if method not in OURS)
        outcome = "win" if WORSE * ours < theirs else "lose" if WORSE * theirs < ours else "tie"
        outcomes[where] = outcome
        row = ", ".join(f"{method} {short(by_method[method])}" for method in order)
        parts.append(f"{where} we {outcome}: {row}")
    sentence = "test loss, best first, a tie within 5 %; " + "; ".join(parts)
    if all(outcome == "win" for outcome in outcomes.values()):
        return "we win", sentence
    return ("mixed" if "win" in outcomes.values() else "we lose"), sentence


CLAIMS = (
    Claim(
        "7", "Both widen the window of learning rates that train; and initialisations, batch sizes",
        _robustness_variants(), _judge_robustness,
    ),
    Claim(
        "8", "Norms removed on all four architectures; power iterations; a grid of rates and tau",
        _ablation_variants(), _judge_ablations, appendix=power_iterations.section,
    ),
    Claim(
        "9", "Other normalisers in sigma's place, schedules, calibration and noise",
        _open_question_variants(), _judge_open_questions,
    ),
    Claim(
        "10", "An unstable run is above the threshold of sharpness more often than a stable one",
        of(SHARPNESS), _judge_sharpness,
        needs=frozenset({"above", "above_scheduled", "first_above"}),
        figure=Figure(
            SHARPNESS_PAIRS,
            (
                Panel("sharpness over its threshold", "over_threshold", log=True),
                Panel("training loss", "loss"),
                Panel("lowest entropy, share of its largest", "entropy"),
            ),
        ),
    ),
    Claim(
        "11", "Against what users would pick instead",
        of(
            {
                f"{method} at {rate:g}": replace(VIT, learning_rate=rate, **changes)
                for rate in RIVAL_RATES
                for method, changes in RIVALS.items()
            }
        ),
        _judge_rivals,
    ),
)  # fmt: skip

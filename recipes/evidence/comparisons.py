"""Claims 7 to 12: robustness, ablations, generalisation, sharpness, what users pick or have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

from recipes.evidence import power_iterations
from recipes.evidence.claim import (
    FAILED_SHARE,
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
    text_of,
    window,
)
from recipes.evidence.from_the_papers import CONTROLS, NO_NORMS, NO_NORMS_SIGMA
from recipes.evidence.runs import ADAMW2, GPT2, SIGMA, STD_VIT, SWIN, VIT, Variant
from recipes.evidence.windows import Window, is_wider, window_text
from recipes.settings import Settings

SHORT = 150
"""Steps of a run where there are many."""

# 7

RATES = (
    1e-4, 1.7e-4, 3e-4, 5.5e-4, 1e-3, 1.7e-3, 3e-3, 5.5e-3, 1e-2, 1.7e-2, 3e-2, 5.5e-2, 1e-1,
)  # fmt: skip
"""Four to a decade, evenly on a logarithmic scale."""

SWEEP: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, warmup": dict(warmup=0.2),
    "AdamW2": ADAMW2,
    "sigmaReparam": SIGMA,
    "both": ADAMW2 | SIGMA,
}
SWEPT_OURS = ("AdamW2", "sigmaReparam", "both")
BASES = {"AdamW": "AdamW without warmup", "AdamW, warmup": "AdamW with warmup"}
CHANGED: dict[str, dict[str, Any]] = {
    "xavier init, batch 32": {},
    "default init": dict(init="default"),
    "init x 1/4": dict(init_scale=0.25),
    "init x 4": dict(init_scale=4.0),
    "batch 8": dict(batch_size=8),
    "batch 128": dict(batch_size=128),
}
EVERY = {"xavier init, batch 32": 1, "default init": 1, "batch 128": 4}
"""Of `RATES`, which are tried under a change: every one, or every fourth; else every second."""

LIMITS = (
    "within 5 % of the method's best",
    "within 5 % of knowing nothing of it",
    "at most half of that of knowing nothing",
)
"""Which losses count as those of rates that train."""


def rates_of(change: str) -> tuple[float, ...]:
    """Return the rates that are tried under a change."""
    return RATES[:: EVERY.get(change, 2)]


def sweep_name(method: str, rate: float, change: str) -> str:
    """Return the name of a run of the sweep."""
    return f"{change}: {method}, lr {rate:g}"


def _robustness_variants() -> tuple[Variant, ...]:
    sweep = replace(VIT, steps=SHORT, monitor_every=0)
    return tuple(
        Variant(
            sweep_name(method, rate, change),
            replace(sweep, learning_rate=rate, **changes, **changed),
        )
        for change, changed in CHANGED.items()
        for method, changes in SWEEP.items()
        for rate in rates_of(change)
    )


def _windows(results: Results, method: str, change: str) -> list[Window]:
    """Return the window of a method for each of `LIMITS`.

    There is none if even the best rate does not train: at chance everywhere, all rates are within
    a few per cent of the best.
    """
    names = {rate: sweep_name(method, rate, change) for rate in rates_of(change)}
    by_rate = {rate: mean(losses(results, name)) for rate, name in names.items()}
    best, reference = min(by_rate.values()), results[names[RATES[0]]][0]["reference"]
    if best > FAILED_SHARE * reference:
        return [None] * len(LIMITS)
    limits = (WORSE * best, best + 0.05 * reference, reference / 2)
    return [window(by_rate, limit) for limit in limits]


def _compared(results: Results, method: str, base: str) -> tuple[int, int]:
    """Return under how many changes a method's windows are wider than another's, or narrower.

    They are so under a change if most of `LIMITS` say so.
    """
    wider = narrower = 0
    for change in CHANGED:
        pairs = list(
            zip(_windows(results, method, change), _windows(results, base, change), strict=True)
        )
        wider += sum(is_wider(own, other, RATES) for own, other in pairs) > len(LIMITS) / 2
        narrower += sum(is_wider(other, own, RATES) for own, other in pairs) > len(LIMITS) / 2
    return wider, narrower


def _judge_robustness(results: Results) -> Verdict:
    """Judge by AdamW without warmup: wider under all changes, under most, or narrower under all."""
    total = len(CHANGED)
    counts = {
        base: {method: _compared(results, method, base) for method in SWEPT_OURS} for base in BASES
    }
    first = next(iter(CHANGED))
    findings = [
        f"Rates from {RATES[0]:g} to {RATES[-1]:g} were tried. The window of a method is the "
        f"stretch of rates whose loss is {', or '.join(LIMITS)}: three limits, three windows.",
    ]
    for method in SWEEP:
        found = _windows(results, method, first)
        widths = ", ".join(window_text(each, RATES) for each in found)
        findings.append(f"{method}: the windows have a width of {widths} ({first}).")
    for base, name in BASES.items():
        each = "; ".join(
            f"{method} wider in {wide} and narrower in {narrow} of {total}"
            for method, (wide, narrow) in counts[base].items()
        )
        findings.append(
            f"Against {name}, over initialisations and batch sizes: {each}. A window counts as "
            "wider by two of the three limits, and by more than 10 % in decades."
        )
    each = ", ".join(f"{wide} with {method}" for method, (wide, _) in counts["AdamW"].items())
    sentence = (
        f"Of {total} initialisations and batch sizes, more rates train than with plain AdamW in "
        f"{each}."
    )
    outcomes = counts["AdamW"].values()
    if all(wider == total for wider, _ in outcomes):
        word = "reproduced"
    elif any(wider > total / 2 for wider, _ in outcomes):
        word = "partly"
    else:
        is_refuted = all(narrower == total for _, narrower in outcomes)
        word = "refuted" if is_refuted else "not at this scale"
    return Verdict(word, sentence, tuple(findings))


def _robustness_tables(results: Results) -> list[str]:
    """Return the windows of all methods, and a table of losses for each init and batch size."""
    head = [f"| | {' | '.join(SWEEP)} |", "|---" * (1 + len(SWEEP)) + "|"]
    lines = [f"Windows in which the loss is {'; '.join(LIMITS)}, below each other.", "", *head]
    for change in CHANGED:
        cells = (
            "<br>".join(
                f"{found[0]:.2g} to {found[1]:.2g}: {window_text(found, RATES)}"
                if found
                else "none"
                for found in _windows(results, method, change)
            )
            for method in SWEEP
        )
        lines.append(f"| {change} | {' | '.join(cells)} |")
    for change in CHANGED:
        lines += ["", f"Test loss by rate, {change}, and how many of the runs failed:", "", *head]
        for rate in rates_of(change):
            names = [sweep_name(method, rate, change) for method in SWEEP]
            cells = (
                text_of(losses(results, name))
                + (f", {failed} fail" if (failed := failures(results, name)) else "")
                for name in names
            )
            lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    return lines


# 8

ABLATED = {
    "ViT": (STD_VIT, "remove_pre_layernorm"),
    "Swin": (replace(SWIN, init="default", weight_decay=0.0), "remove_pre_layernorm"),
    "GPT-2": (replace(GPT2, init="default", weight_decay=0.0), "remove_pre_layernorm"),
    "BERT": (replace(GPT2, model="bert", init="default", weight_decay=0.0), "remove_layernorm"),
}
REMOVALS = {model: removal for model, (_, removal) in ABLATED.items()}
KINDS = ("norms", "no norms", "no norms, sigmaReparam")
ITERATIONS = (1, 2, 3, 5)
GRID_RATES, GRID_TAUS = (3e-3, 1e-2, 3e-2), (0.001, 0.004, 0.03)


def _loss_text(results: Results, name: str) -> str:
    """Return the mean loss of a variant, and how many of its runs failed, if any did."""
    failed = failures(results, name)
    return short(mean(losses(results, name))) + (f" ({failed} fail)" if failed else "")


def _ablations(removal: str) -> tuple[str, str, str]:
    """Return the methods of `KINDS`."""
    return "", removal, f"{removal},sigma_reparam"


def _ablation_variants() -> tuple[Variant, ...]:
    found = []
    for model, (settings, removal) in ABLATED.items():
        base = replace(settings, learning_rate=1e-3, steps=SHORT, monitor_every=0)
        for kind, methods in zip(KINDS, _ablations(removal), strict=True):
            found.append(Variant(f"{model}, {kind}", replace(base, patch=methods)))
    for model, settings in CONTROLS.items():
        for kind, methods in zip(KINDS, _ablations(REMOVALS[model]), strict=True):
            found.append(Variant(f"{model} that trains, {kind}", replace(settings, patch=methods)))
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
    of_mean = partial(_loss_text, results)

    def of_kinds(name: str) -> str:
        norms, none, ours = (of_mean(f"{name}, {kind}") for kind in KINDS)
        return f"test loss {norms} with norms, {none} without, {ours} with sigmaReparam instead"

    stalled = [model for model in ABLATED if mostly_fails(results, f"{model}, {KINDS[0]}")]
    helped, behind = 0, 0
    for model in CONTROLS:
        norms, none, ours = (
            mean(losses(results, f"{model} that trains, {kind}")) for kind in KINDS
        )
        helped += WORSE * ours < none
        behind += WORSE * norms < ours
    iterations = ", ".join(f"{of_mean(f'power iterations {n}')} with {n}" for n in ITERATIONS)
    total = len(CONTROLS)
    findings = [
        "From xavier, at the rates at which the controls of claim 1 train:",
        *(f"{model}: {of_kinds(f'{model} that trains')}." for model in CONTROLS),
        "From transformers' own initialisation at a rate of 0.001, where the model with norms "
        f"fails itself ({', '.join(stalled) or 'nowhere'}), a result says little:",
        *(f"{model}: {of_kinds(model)}." for model in ABLATED),
        f"Power iterations of AdamW2: test loss {iterations}. Time and accuracy against depth "
        "stand below.",
    ]
    for tau in GRID_TAUS:
        row = ", ".join(
            f"{of_mean(f'grid, lr {rate:g}, tau {tau:g}')} at {rate:g}" for rate in GRID_RATES
        )
        findings.append(f"With tau {tau:g}, by rate: test loss {row}.")
    sentence = (
        f"In place of the norms, sigmaReparam helps {helped} of {total} models; norms are better "
        f"than it on {behind}."
    )
    return Verdict("measured", sentence, tuple(findings))


# 9

NORMALISERS: dict[str, dict[str, Any]] = {
    "sigma": SIGMA,
    "frobenius": dict(normaliser="frobenius"),
    "weight norm": dict(normaliser="weight_norm"),
}
NORMALISED_RATES = (1e-3, 1e-2)
SCHEDULES: dict[str, Any] = {
    # transformers' constant schedule has no warmup; its other one is linear, then constant.
    "constant": dict(lr_scheduler_type="constant_with_warmup"),
    "linear": dict(lr_scheduler_type="linear"),
    "cosine": {},
    # At 60 % of the steps, to a tenth of the rate, which it reaches in one step.
    "step": dict(lr_scheduler_type="warmup_stable_decay"),
}
SCHEDULED: dict[str, dict[str, Any]] = {
    "AdamW, warmup 10 %": dict(warmup=0.1),
    "AdamW2": ADAMW2,
    "sigmaReparam": SIGMA,
}
GENERALISATION = ("calibration_error", "noisy_accuracy")
STEP_AT, STEP_TO = 0.6, 0.1


def _open_question_variants() -> tuple[Variant, ...]:
    found = [
        Variant(f"{name}, lr {rate:g}", replace(STD_VIT, learning_rate=rate, **changes))
        for rate in NORMALISED_RATES
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
        clean, noisy = (mean(run[key] for run in runs) for key in ("accuracy", "noisy_accuracy"))
        errors = [run["calibration_error"] for run in runs]
        error = "NaN" if None in errors else f"{mean(errors):.2f}"
        return (
            f"{name}: test loss {short(mean(losses(results, name)))}, calibration error {error}, "
            f"accuracy {clean:.2f}, under noise {noisy:.2f}."
        )

    best = [
        min(NORMALISERS, key=lambda name: mean(losses(results, f"{name}, lr {rate:g}")))
        for rate in NORMALISED_RATES
    ]
    wins, total = best.count("sigma"), len(NORMALISED_RATES)
    sentence = f"Of three normalisers sigma gives the lowest loss at {wins} of {total} rates."
    noise = "Noise has a standard deviation of one."
    return Verdict("measured", sentence, (noise, *map(shown, results)))


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


MARGIN = 0.1
"""Difference of shares that counts: more than one of the eleven measurements."""


def _judge_sharpness(results: Results) -> Verdict:
    """Judge by the threshold of the rate used and by that of the scheduled one.

    AdamW2 has a rate for each matrix, and it is open which one rate stands for them all: a pair
    shows the claim, or its opposite, if both thresholds say so.
    """
    findings, disputed, signs = [], [], []
    for unstable, stable in SHARPNESS_PAIRS:
        by_key: dict[str, list[float]] = {"above": [], "above_scheduled": []}
        for name in (unstable, stable):
            runs = results[name]
            for key, shares in by_key.items():
                shares.append(mean(run[key] for run in runs))
            share, scheduled = (shares[-1] for shares in by_key.values())
            first = ["never" if r["first_above"] is None else str(r["first_above"]) for r in runs]
            by_other = f" By the scheduled rate it is {scheduled:.2f}." * (scheduled != share)
            findings.append(
                f"{name}: the share of steps 2 to {SPIKE_STEPS} above the threshold is "
                f"{share:.2f}, first at steps {', '.join(first)}.{by_other}"
            )
        gaps = [shares[0] - shares[1] for shares in by_key.values()]
        signs.append([(gap > MARGIN) - (gap < -MARGIN) for gap in gaps])
        if len(set(signs[-1])) > 1:
            disputed.append(f"{unstable} and {stable}")
    findings = [
        "A run has two thresholds: that of the rate that was used, and that of the scheduled rate.",
        *findings,
        *(f"The two thresholds disagree on {pair}." for pair in disputed),
    ]
    agreed = sum(set(pair) == {1} for pair in signs)
    sentence = (
        f"The unstable run is above the threshold more often in {agreed} of {len(signs)} pairs; "
        f"the two thresholds disagree on {len(disputed)}."
    )
    if agreed == len(signs):
        word = "reproduced"
    elif any(1 in pair for pair in signs):
        word = "partly"
    else:
        is_refuted = all(set(pair) == {-1} for pair in signs)
        word = "refuted" if is_refuted else "not at this scale"
    return Verdict(word, sentence, tuple(findings))


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
BEST = "over all rates"


def judge_rivals(
    results: Results, *, rivals: Sequence[str], ours: Sequence[str], rates: Sequence[float]
) -> Verdict:
    """Judge at each rate, and over all of them, whether one of ours is best by more than 5 %.

    Args:
        results: of variants `METHOD at RATE`.
        rivals: all methods, ours too.
        ours: of them.
        rates: that each was tried at.
    """
    by_rate = {
        f"at {rate:g}": {m: mean(losses(results, f"{m} at {rate:g}")) for m in rivals}
        for rate in rates
    }
    tables = by_rate | {BEST: {m: min(row[m] for row in by_rate.values()) for m in rivals}}
    findings, outcomes = [], {}
    for where, by_method in tables.items():
        order = sorted(by_method, key=lambda method: by_method[method])
        own = min(by_method[method] for method in ours)
        theirs = min(loss for method, loss in by_method.items() if method not in ours)
        outcome = "win" if WORSE * own < theirs else "lose" if WORSE * theirs < own else "tie"
        outcomes[where] = outcome
        row = ", ".join(f"{method} {short(by_method[method])}" for method in order)
        findings.append(f"{where[0].upper()}{where[1:]} we {outcome}. Test loss: {row}.")
    findings.append("A tie is a difference of at most 5 %.")
    wins = sum(outcomes[where] == "win" for where in by_rate)
    by_best = tables[BEST]
    best = min(by_best, key=lambda method: by_best[method])
    sentence = (
        f"One of ours is best at {wins} of {len(by_rate)} rates; over all rates the lowest loss "
        f"is that of {best}."
    )
    if all(outcome == "win" for outcome in outcomes.values()):
        word = "we win"
    else:
        word = "mixed" if "win" in outcomes.values() else "we lose"
    return Verdict(word, sentence, tuple(findings))


# 12

COMBINED_RATES = (3e-3, 1e-2)
COMBINED: dict[str, dict[str, Any]] = {
    **{name: RIVALS[name] for name in ("AdamW", "AdamW, warmup 20 %", "AdamW2", "sigmaReparam")},
    "AdamW2, warmup 20 %": ADAMW2 | dict(warmup=0.2),
    "AdamW2, clipped at 1": ADAMW2 | dict(max_grad_norm=1.0),
    "AdamW, rollback": dict(on_collapse="rollback", save_steps=25),
    "AdamW2, rollback": ADAMW2 | dict(on_collapse="rollback", save_steps=25),
}
ADDED = ("AdamW2, warmup 20 %", "AdamW2, clipped at 1")
IN_BF16 = ("AdamW", "AdamW, warmup 20 %", "AdamW2", "sigmaReparam")


def _combined_variants() -> dict[str, Settings]:
    found = {}
    for rate in COMBINED_RATES:
        for method, changes in COMBINED.items():
            settings = replace(VIT, learning_rate=rate, **changes)
            found[f"{method} at {rate:g}"] = settings
            if method in IN_BF16:
                found[f"{method}, bf16 at {rate:g}"] = replace(settings, bf16=True)
    return found


def _judge_combined(results: Results) -> Verdict:
    of_mean = partial(_loss_text, results)
    findings, changed, helped = [], 0, 0
    for rate in COMBINED_RATES:
        of_rate = {name: mean(losses(results, f"{name} at {rate:g}")) for name in COMBINED}
        for method in IN_BF16:
            half = mean(losses(results, f"{method}, bf16 at {rate:g}"))
            changed += max(half, of_rate[method]) > WORSE * min(half, of_rate[method])
        helped += all(WORSE * of_rate[name] < of_rate["AdamW2"] for name in ADDED)
        halves = ", ".join(
            f"{method} {of_mean(f'{method} at {rate:g}')} and "
            f"{of_mean(f'{method}, bf16 at {rate:g}')}"
            for method in IN_BF16
        )
        others = ", ".join(
            f"{method} {of_mean(f'{method} at {rate:g}')}"
            for method in COMBINED
            if method not in IN_BF16
        )
        findings += [
            f"At {rate:g}, test loss in float32 and under bfloat16 autocast: {halves}.",
            f"At {rate:g}, test loss: {others}.",
        ]
    total = len(COMBINED_RATES)
    sentence = (
        f"Warmup and clipping both improve AdamW2 at {helped} of {total} rates; bfloat16 changes "
        f"the loss by more than 5 % in {changed} of {total * len(IN_BF16)} set-ups."
    )
    return Verdict("measured", sentence, tuple(findings))


CLAIMS = (
    Claim(
        "7", "More learning rates train",
        "Both widen the window of learning rates that train; and initialisations, batch sizes",
        _robustness_variants(), _judge_robustness, rows=_robustness_tables,
    ),
    Claim(
        "8", "Norms, power iterations, tau",
        "Norms removed on all four architectures; power iterations; a grid of rates and tau",
        _ablation_variants(), _judge_ablations, appendix=power_iterations.section,
    ),
    Claim(
        "9", "Normalisers, schedules, noise",
        "Other normalisers in sigma's place, schedules, calibration and noise",
        _open_question_variants(), _judge_open_questions, needs=frozenset(GENERALISATION),
    ),
    Claim(
        "10", "Sharpness of unstable runs",
        "An unstable run is above the threshold of sharpness more often than a stable one",
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
        "11", "Against what users would pick",
        "Against what users would pick instead",
        of(
            {
                f"{method} at {rate:g}": replace(VIT, learning_rate=rate, **changes)
                for rate in RIVAL_RATES
                for method, changes in RIVALS.items()
            }
        ),
        partial(judge_rivals, rivals=tuple(RIVALS), ours=OURS, rates=RIVAL_RATES),
    ),
    Claim(
        "12", "With what runs have already",
        "With what runs have already: half precision, warmup, clipping, rollback",
        of(_combined_variants()), _judge_combined,
    ),
)  # fmt: skip

"""Claims 1 to 6: what the two papers say, and the runs that test it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import mean, median
from typing import Any

from recipes.evidence.claim import (
    ROWS_SPARSE,
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
from recipes.evidence.runs import ADAMW2, GPT2, SIGMA, STD_VIT, SWIN, VIT, Variant
from recipes.settings import Settings

# 1


WARMUP = "AdamW, warmup 20 %"
PLAIN = "AdamW, no warmup"
OURS = "AdamW2, no warmup"
CONTROL = "AdamW at a tenth of the rate, no warmup"
MODELS = {
    "ViT": VIT,
    "Swin": SWIN,
    "GPT-2": GPT2,
    "BERT": replace(GPT2, model="bert", learning_rate=3e-3, steps=200),
}
TAUS = {"ViT": "tau=0.004", "Swin": "tau=0.004", "GPT-2": "tau=0.01", "BERT": "tau=0.004"}


def _warmup_variants() -> tuple[Variant, ...]:
    found = []
    for model, settings in MODELS.items():
        # Rounded, as people write rates: 0.1 * 0.03 is not 0.003.
        lower = float(f"{settings.learning_rate / 10:g}")
        found += [
            Variant(f"{model}, {PLAIN}", settings),
            Variant(f"{model}, {WARMUP}", replace(settings, warmup=0.2)),
            Variant(f"{model}, {OURS}", replace(settings, optim="adamw2", optim_args=TAUS[model])),
            Variant(f"{model}, {CONTROL}", replace(settings, learning_rate=lower)),
        ]
    return tuple(found)


def _judge_warmup(results: Results) -> Verdict:
    shown, parts, why, as_good, worse = [], [], [], [], []
    models = [model for model in MODELS if f"{model}, {OURS}" in results]
    for model in models:
        plain, warm, ours = (
            mean(losses(results, f"{model}, {kind}")) for kind in (PLAIN, WARMUP, OURS)
        )
        matches, fails = ours <= WORSE * warm, mostly_fails(results, f"{model}, {PLAIN}")
        if matches and fails:
            shown.append(model)
        if not matches:
            why.append(f"on {model} AdamW2 is worse than warmup")
            worse.append(model)
        if not fails:
            count = failures(results, f"{model}, {PLAIN}")
            total = len(results[f"{model}, {PLAIN}"])
            why.append(f"on {model} AdamW without warmup fails in {count} of {total}")
        numbers = [plain, warm, ours]
        if f"{model}, {CONTROL}" in results:
            numbers.append(mean(losses(results, f"{model}, {CONTROL}")))
            if numbers[-1] <= WORSE * ours:
                as_good.append(model)
        parts.append(f"{model} {' / '.join(map(short, numbers))}")
    has_control = any(f"{model}, {CONTROL}" in results for model in models)
    sentence = (
        "test loss of AdamW without warmup / with it / AdamW2 without"
        + " / AdamW without warmup at a tenth of the rate" * has_control
        + f": {'; '.join(parts)}"
    )
    if why:
        sentence += ". But " + ", ".join(why)
    if as_good:
        sentence += (
            ". The lower rate alone comes within 5 % of AdamW2, or beats it, on "
            f"{', '.join(as_good)}"
        )
    if len(shown) == len(models):
        return "reproduced", sentence
    if shown:
        return "partly", sentence
    return ("refuted" if len(worse) == len(models) else "not at this scale"), sentence


# 2

TAU_VALUES = (0.001, 0.004, 0.01, 0.03, 0.1)


def _judge_tau(results: Results) -> Verdict:
    by_tau = {tau: mean(losses(results, f"tau {tau}")) for tau in TAU_VALUES}
    best = min(by_tau, key=lambda tau: by_tau[tau])
    close = [tau for tau, loss in by_tau.items() if loss <= WORSE * by_tau[best]]
    is_inner, is_broad = best not in (TAU_VALUES[0], TAU_VALUES[-1]), len(close) > 1
    sentence = (
        "mean test loss by tau: "
        + ", ".join(f"{tau}: {short(loss)}" for tau, loss in by_tau.items())
        + f"; best at {best}, within 5 % of it {', '.join(map(str, close))}"
    )
    return ("refuted", "partly", "reproduced")[is_inner + is_broad], sentence


# 3

RATED = ("ViT", "GPT-2")
LATER = ("shallow_over_deep", "w2_over_w1")


def _judge_rates(results: Results) -> Verdict:
    parts, rising, clipped, opposite = [], 0, dict.fromkeys(LATER, 0), dict.fromkeys(LATER, 0)
    for model in RATED:
        rates = [run["rates"] for run in results[f"{model}, {OURS}"]]
        early, late, *ratios = (median(r[key] for r in rates) for key in ("early", "late", *LATER))
        rising += early < late
        for key, ratio in zip(LATER, ratios, strict=True):
            clipped[key] += WORSE * ratio < 1
            opposite[key] += ratio > WORSE
        parts.append(
            f"{model}: share of the scheduled rate that was used, median {early:.2g} in the first "
            f"fifth, {late:.2g} later; over the first half shallow over deep blocks "
            f"{ratios[0]:.2f}, W2 over W1 {ratios[1]:.2f}"
        )
    told = []
    for key, name in zip(LATER, ("shallow blocks are", "W2 is"), strict=True):
        if clipped[key] == len(RATED):
            word = "clipped more, as claimed"
        elif clipped[key]:
            word = f"clipped more on {clipped[key]} of {len(RATED)} models only"
        else:
            word = "not clipped more: refuted"
        told.append(f"{name} {word}")
    sentence = (
        f"{'. '.join(parts)}. So rates rise as in a warmup on {rising} of {len(RATED)} models, "
        f"{' and '.join(told)}"
    )
    if rising == len(RATED) and all(count == len(RATED) for count in clipped.values()):
        return "reproduced", sentence
    return ("partly" if rising or any(clipped.values()) else "refuted"), sentence


# 4

NO_NORMS = "remove_pre_layernorm"
NO_NORMS_SIGMA = "remove_pre_layernorm,sigma_reparam"
COLLAPSE_PAIRS = (
    ("ViT, lr 3e-2, AdamW", "ViT, lr 3e-2, AdamW2"),
    ("ViT without block norms, plain", "ViT without block norms, sigmaReparam"),
)
COLLAPSE = {
    "ViT, lr 3e-2, AdamW": replace(VIT, learning_rate=3e-2),
    "ViT, lr 3e-2, AdamW2": replace(VIT, learning_rate=3e-2, **ADAMW2),
    "ViT without block norms, plain": replace(STD_VIT, patch=NO_NORMS),
    "ViT without block norms, sigmaReparam": replace(STD_VIT, patch=NO_NORMS_SIGMA),
}


def _judge_collapse(results: Results) -> Verdict:
    parts, signs, reversed_signs = [], [], []
    for bad, good in COLLAPSE_PAIRS:
        if bad not in results or good not in results:
            continue
        falls = [run["fall_step"] for run in results[bad]]
        crashes = [run["crash_step"] for run in results[bad]]
        in_time = sum(
            fall is not None and crash is not None and fall <= crash
            for fall, crash in zip(falls, crashes, strict=True)
        )
        lowest, growth = (
            [median(run[key] for run in results[name]) for name in (bad, good)]
            for key in ("lowest_entropy", "sigma_growth")
        )
        ends_better = WORSE * median(losses(results, good)) < median(losses(results, bad))
        differs = lowest[0] < lowest[1] and growth[0] > growth[1]
        fails = mostly_fails(results, bad)
        signs.append(fails and ends_better and in_time > len(falls) / 2 and differs)
        reversed_signs.append(fails and lowest[0] > lowest[1] and growth[0] < growth[1])
        parts.append(
            f"{bad}: {failures(results, bad)} of {len(falls)} fail, a head below half of its "
            f"largest entropy first at steps {_steps(falls)}, crash (spike or loss lost) at steps "
            f"{_steps(crashes)}, so not later than it in {in_time} of {len(falls)}; lowest entropy "
            f"share {lowest[0]:.2g}, sigma1(Wq^T Wk) grows {growth[0]:.3g} x. {good}: "
            f"{failures(results, good)} of {len(results[good])} fail, {lowest[1]:.2g}, "
            f"{growth[1]:.3g} x, below half at steps "
            f"{_steps([run['fall_step'] for run in results[good]])}"
        )
    sentence = ". ".join(parts)
    if all(signs):
        return "reproduced", sentence
    if any(signs):
        return "partly", sentence
    return ("refuted" if all(reversed_signs) else "not at this scale"), sentence


def _steps(steps: list[int | None]) -> str:
    return ", ".join("never" if step is None else str(step) for step in steps)


# 5

LOOKED_AT = (
    *of(COLLAPSE),
    *(
        variant
        for variant in _warmup_variants()
        if variant.name.endswith(CONTROL) or variant.name in (f"GPT-2, {OURS}", f"ViT, {OURS}")
    ),
)


def _judge_modes(results: Results) -> Verdict:
    totals: Counter[str] = Counter()
    in_failed: Counter[str] = Counter()
    for name, runs in results.items():
        for run in runs:
            totals.update(run["modes"])
            if failures({name: [run]}, name):
                in_failed.update(run["modes"])
    defined = sum(totals.values()) - totals["undefined"]
    sentence = (
        f"of {defined} head maps in {len(results)} set-ups {totals['benign']} benign and "
        f"{totals['malignant']} malignant; {in_failed['malignant']} of the malignant and "
        f"{in_failed['benign']} of the benign in runs that failed. Another {totals['undefined']} "
        "are of steps after the weights were NaN, when there is no attention to look at"
    )
    kinds = sum(totals[mode] > 0 for mode in ("benign", "malignant"))
    return ("not at this scale", "partly", "reproduced")[kinds], sentence


# 6

SGD = dict(optim="torch:SGD", optim_args='{"momentum": 0.9}')
NARROW = {"num_hidden_layers": 48, "hidden_size": 32, "intermediate_size": 128}
DEEPER = dict(model_config=NARROW, batch_size=16, steps=150)
DEEP = dict(model_config={"num_hidden_layers": 24}, batch_size=16, steps=200)
SLOW = replace(STD_VIT, learning_rate=1e-3)


def _deep(layers: int, steps: int, **changes: Any) -> Settings:
    config = NARROW | {"num_hidden_layers": layers}
    settings = replace(SLOW, model_config=config, batch_size=16, steps=steps, monitor_every=20)
    return replace(settings, **changes)


SIGMA_PAIRS = {
    "no warmup, lr 1e-2": (STD_VIT, replace(STD_VIT, **SIGMA)),
    "no warmup, lr 1e-2, weight decay 0.05": (
        replace(STD_VIT, weight_decay=0.05),
        replace(STD_VIT, weight_decay=0.05, **SIGMA),
    ),
    "no block norms, lr 1e-3": (
        replace(SLOW, patch=NO_NORMS),
        replace(SLOW, patch=NO_NORMS_SIGMA),
    ),
    "no block norms, lr 1e-2": (
        replace(STD_VIT, patch=NO_NORMS),
        replace(STD_VIT, patch=NO_NORMS_SIGMA),
    ),
    **{
        f"SGD with momentum, lr {rate:g}": (
            replace(STD_VIT, learning_rate=rate, **SGD),
            replace(STD_VIT, learning_rate=rate, **SGD, **SIGMA),
        )
        for rate in (1e-2, 1e-1, 1.0)
    },
    "24 layers, lr 1e-3": (replace(SLOW, **DEEP), replace(SLOW, **DEEP, **SIGMA)),
    "48 layers, narrow, lr 1e-3": (
        replace(SLOW, **DEEPER),
        replace(SLOW, **DEEPER, **SIGMA),
    ),
    **{
        f"{layers} layers, narrow, no block norms, lr 1e-3{end}": (
            _deep(layers, steps, patch=NO_NORMS),
            _deep(layers, steps, patch=NO_NORMS_SIGMA, patch_init=init),
        )
        for layers, steps, init, end in (
            (24, 150, "one", ""),
            (24, 150, "spectral", ", init spectral"),
            (48, 150, "one", ""),
            (100, 60, "one", ""),
            (100, 60, "spectral", ", init spectral"),
        )
    },
}  # fmt: skip


def _judge_sigma(results: Results) -> Verdict:
    parts, better, worse, collapses, kept, lower = [], [], [], [], [], []
    for name in SIGMA_PAIRS:
        if f"{name}, sigmaReparam" not in results:
            continue
        kinds = [f"{name}, {kind}" for kind in ("plain", "sigmaReparam")]
        plain, ours = (median(losses(results, kind)) for kind in kinds)
        low, ours_low = (median(run["lowest_entropy"] for run in results[kind]) for kind in kinds)
        better += [name] * (WORSE * ours < plain)
        worse += [name] * (WORSE * plain < ours)
        collapses += [name] * (low < ROWS_SPARSE)
        kept += [name] * (low < ROWS_SPARSE <= ours_low)
        lower += [name] * (ours_low < ROWS_SPARSE <= low)
        parts.append(
            f"{name}: {short(plain)} -> {short(ours)}, {low:.2f} -> {ours_low:.2f}, "
            f"{failures(results, kinds[0])} -> {failures(results, kinds[1])} fail"
        )
    sentence = (
        f"loss more than 5 % better in {len(better)} of {len(parts)} set-ups and worse in "
        f"{len(worse)}; entropy stays above half in {len(kept)} of the {len(collapses)} in which "
        f"plain attention falls below it, and falls below it in {len(lower)} of the others. Median "
        "test loss and lowest entropy share, plain -> sigmaReparam: " + "; ".join(parts)
    )
    if len(better) == len(parts) and len(kept) == len(collapses):
        return "reproduced", sentence
    if better or kept:
        return "partly", sentence
    return ("refuted" if len(worse) == len(parts) else "not at this scale"), sentence


COURSES = (
    Panel("training loss", "loss"),
    Panel("lowest entropy, share of its largest", "entropy"),
    Panel("highest SEC of Wq^T Wk", "sec"),
    Panel("largest sigma1(Wq^T Wk)", "sigma_qk", log=True),
)

CLAIMS = (
    Claim(
        "1", "AdamW2 without warmup matches or beats AdamW with warmup, while AdamW without "
        "warmup fails (Qi et al. 2025, Table 1)", _warmup_variants(), _judge_warmup,
        quick=tuple(f"ViT, {kind}" for kind in (PLAIN, WARMUP, OURS)),
    ),
    Claim(
        "2", "tau has a broad optimum (Qi et al. 2025, Figure 6)",
        tuple(
            Variant(f"tau {tau}", replace(VIT, optim="adamw2", optim_args=f"tau={tau}"))
            for tau in TAU_VALUES
        ),
        _judge_tau,
    ),
    Claim(
        "3", "The effective rate looks like a warmup; shallow layers and W2 are clipped more "
        "(Qi et al. 2025, Appendix M)",
        tuple(v for v in _warmup_variants() if v.name in [f"{m}, {OURS}" for m in RATED]),
        _judge_rates,
        needs=frozenset({"rates"}),
        figure=Figure(
            tuple((f"{model}, {OURS}",) for model in RATED),
            (Panel("mean rate used in each block", "blocks"), Panel("training loss", "loss")),
        ),
    ),
    Claim(
        "4", "Collapse of attention precedes or accompanies the crash (Zhai et al. 2023, "
        "Figure 1; Qi et al. 2025, Figures 4, 8 to 10)", of(COLLAPSE), _judge_collapse,
        needs=frozenset({"fall_step", "crash_step", "sigma_growth"}),
        figure=Figure(COLLAPSE_PAIRS, COURSES, log_steps=True),
        quick=COLLAPSE_PAIRS[1],
    ),
    Claim(
        "5", "Benign and malignant collapse occur and are told apart (Qi et al. 2025, "
        "Figure 3)",
        LOOKED_AT, _judge_modes, needs=frozenset({"modes"}),
    ),
    Claim(
        "6", "sigmaReparam keeps entropy from collapsing and trains where the baseline does "
        "not (Zhai et al. 2023)",
        tuple(
            Variant(f"{name}, {kind}", each)
            for name, pair in SIGMA_PAIRS.items()
            for kind, each in zip(("plain", "sigmaReparam"), pair, strict=True)
        ),
        _judge_sigma,
        quick=("no warmup, lr 1e-2, plain", "no warmup, lr 1e-2, sigmaReparam"),
    ),
)  # fmt: skip

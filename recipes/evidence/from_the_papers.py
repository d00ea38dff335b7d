"""Claims 1 to 6: what the two papers say, and the runs that test it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean, median
from typing import Any

from recipes.evidence.claim import (
    ROWS_SPARSE,
    WORSE,
    Claim,
    Results,
    Verdict,
    failures,
    losses,
    of,
)
from recipes.evidence.runs import ADAMW2, GPT2, SIGMA, STD_VIT, SWIN, VIT, Variant

# 1


WARMUP = "AdamW, warmup 20 %"
PLAIN = "AdamW, no warmup"
OURS = "AdamW2, no warmup"
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
        found += [
            Variant(f"{model}, {PLAIN}", settings),
            Variant(f"{model}, {WARMUP}", replace(settings, warmup=0.2)),
            Variant(f"{model}, {OURS}", replace(settings, optim="adamw2", optim_args=TAUS[model])),
        ]
    return tuple(found)


def _judge_warmup(results: Results) -> Verdict:
    models = [model for model in MODELS if f"{model}, {OURS}" in results]
    shown, parts = [], []
    for model in models:
        plain, warm, ours = (
            mean(losses(results, f"{model}, {kind}")) for kind in (PLAIN, WARMUP, OURS)
        )
        matches, plain_is_worse = ours <= WORSE * warm, plain > WORSE * ours
        if matches and plain_is_worse:
            shown.append(model)
        parts.append(f"{model} {plain:.3g} / {warm:.3g} / {ours:.3g}")
    sentence = f"test loss without / with warmup / AdamW2: {'; '.join(parts)}"
    if len(shown) == len(models):
        return "reproduced", sentence
    if shown:
        others = [model for model in models if model not in shown]
        return "partly", f"{sentence}. Not on {', '.join(others)}"
    return "not at this scale", sentence


# 2

TAU_VALUES = (0.001, 0.004, 0.01, 0.03, 0.1)


def _judge_tau(results: Results) -> Verdict:
    by_tau = {tau: mean(losses(results, f"tau {tau}")) for tau in TAU_VALUES}
    best = min(by_tau, key=lambda tau: by_tau[tau])
    sentence = "mean test loss by tau: " + ", ".join(f"{t}: {v:.3g}" for t, v in by_tau.items())
    inner = best not in (TAU_VALUES[0], TAU_VALUES[-1])
    return ("reproduced" if inner else "partly"), f"{sentence}; best at {best}"


# 3


def _judge_rates(results: Results) -> Verdict:
    early, late, shallow, deep, second, first = [], [], [], [], [], []
    for result in results[f"ViT, {OURS}"]:
        probes = [p for p in result["probes"] if "rates" in p]
        steps, top = result["settings"]["steps"], result["settings"]["learning_rate"]
        for probe in probes:
            scheduled = top * 0.5 * (1 + math.cos(math.pi * (probe["step"] - 1) / steps))
            blocks = [v for k, v in probe["rates"].items() if k.startswith("block ")]
            share = mean(blocks) / scheduled if scheduled else 1.0
            (early if probe["step"] <= 0.2 * steps else late).append(share)
            if probe["step"] <= steps / 2:
                half = len(blocks) // 2
                shallow.append(mean(blocks[:half]))
                deep.append(mean(blocks[half:]))
                first.append(probe["rates"].get("mlp.fc1.weight", math.nan))
                second.append(probe["rates"].get("mlp.fc2.weight", math.nan))
    rising = median(early) < median(late)
    sentence = (
        f"used over scheduled rate: median {median(early):.2g} in the first fifth, "
        f"{median(late):.2g} later; over the first half, shallow over deep blocks "
        f"{mean(shallow) / mean(deep):.2f}, W2 over W1 {mean(second) / mean(first):.2f}"
    )
    clipped = mean(shallow) < mean(deep), mean(second) < mean(first)
    if rising and all(clipped):
        return "reproduced", sentence
    return ("partly" if rising else "refuted"), sentence


# 4

COLLAPSE = {
    "ViT, lr 3e-2, AdamW": replace(VIT, learning_rate=3e-2),
    "ViT, lr 3e-2, AdamW2": replace(VIT, learning_rate=3e-2, **ADAMW2),
    "ViT without norms, plain": replace(STD_VIT, patch="remove_pre_layernorm", patch_scope="all"),
    "ViT without norms, sigmaReparam": replace(
        STD_VIT, patch="remove_pre_layernorm,sigma_reparam", patch_scope="blocks"
    ),
}


def _first_fall(result: Mapping[str, Any]) -> int | None:
    for probe in result["probes"]:
        values = [v for v in probe["entropy_normalised"] if v is not None]
        if not values or min(values) < ROWS_SPARSE:
            return probe["step"]
    return None


def _judge_collapse(results: Results) -> Verdict:
    parts, signs = [], []
    for bad, good in (
        ("ViT, lr 3e-2, AdamW", "ViT, lr 3e-2, AdamW2"),
        ("ViT without norms, plain", "ViT without norms, sigmaReparam"),
    ):
        if bad not in results or good not in results:
            continue
        falls = [_first_fall(r) for r in results[bad]]
        steady = sum(_first_fall(r) is None for r in results[good])
        failed = failures(results, bad)
        growth = [_growth(r) for r in results[bad]]
        calm = [_growth(r) for r in results[good]]
        parts.append(
            f"{bad}: {failed} of {len(falls)} fail, entropy below half at steps "
            f"{', '.join('never' if f is None else str(f) for f in falls)}, sigma1(Wq^T Wk) grows "
            f"{median(growth):.3g} x; {good}: entropy stays above half in {steady} of "
            f"{len(results[good])}, {median(calm):.3g} x"
        )
        signs.append(
            failed > len(falls) / 2 and None not in falls and median(growth) > median(calm)
        )
    verdict = "reproduced" if all(signs) else "partly" if any(signs) else "not at this scale"
    return verdict, ". ".join(parts)


def _growth(result: Mapping[str, Any]) -> float:
    sigmas = [
        max((v for v in p["sigma_qk"] if v is not None), default=math.inf)
        for p in result["probes"]
        if p["sigma_qk"]
    ]
    return max(sigmas) / sigmas[0] if sigmas and sigmas[0] else math.nan


# 5


def _judge_modes(results: Results) -> Verdict:
    totals: dict[str, int] = {}
    bad: dict[str, int] = {}
    for name, runs in results.items():
        for result in runs:
            for probe in result["probes"]:
                for mode, count in probe["modes"].items():
                    totals[mode] = totals.get(mode, 0) + count
                    if failures({name: [result]}, name):
                        bad[mode] = bad.get(mode, 0) + count
    sentence = "head maps seen: " + ", ".join(f"{k} {v}" for k, v in sorted(totals.items()))
    sentence += "; of these in runs that failed: "
    sentence += ", ".join(f"{k} {v}" for k, v in sorted(bad.items())) or "none"
    kinds = sum(totals.get(mode, 0) > 0 for mode in ("benign", "malignant"))
    return ("not at this scale", "partly", "reproduced")[kinds], sentence


# 6

SGD = dict(optim="torch:SGD", optim_args='{"momentum": 0.9}')
NARROW = {"num_hidden_layers": 48, "hidden_size": 32, "intermediate_size": 128}
DEEPER = dict(model_config=NARROW, batch_size=16, steps=150)
DEEP = dict(model_config={"num_hidden_layers": 24}, batch_size=16, steps=200)
SIGMA_PAIRS = {
    "no warmup, lr 1e-2": (STD_VIT, replace(STD_VIT, **SIGMA)),
    "no block norms, lr 1e-3": (
        replace(STD_VIT, learning_rate=1e-3, patch="remove_pre_layernorm"),
        replace(STD_VIT, learning_rate=1e-3, patch="remove_pre_layernorm,sigma_reparam"),
    ),
    "no block norms, lr 1e-2": (
        replace(STD_VIT, patch="remove_pre_layernorm"),
        replace(STD_VIT, patch="remove_pre_layernorm,sigma_reparam"),
    ),
    "SGD with momentum, lr 1e-1": (
        replace(STD_VIT, learning_rate=1e-1, **SGD),
        replace(STD_VIT, learning_rate=1e-1, **SGD, **SIGMA),
    ),
    "24 layers, lr 1e-3": (
        replace(STD_VIT, learning_rate=1e-3, **DEEP),
        replace(STD_VIT, learning_rate=1e-3, **DEEP, **SIGMA),
    ),
    "48 layers, narrow, lr 1e-3": (
        replace(STD_VIT, learning_rate=1e-3, **DEEPER),
        replace(STD_VIT, learning_rate=1e-3, **DEEPER, **SIGMA),
    ),
}


def _judge_sigma(results: Results) -> Verdict:
    parts, won, total = [], 0, 0
    for name in SIGMA_PAIRS:
        if f"{name}, sigmaReparam" not in results:
            continue
        plain, ours = (losses(results, f"{name}, {kind}") for kind in ("plain", "sigmaReparam"))
        entropies = [
            min(
                (v for p in r["probes"] for v in p["entropy_normalised"] if v is not None),
                default=0,
            )
            for kind in ("plain", "sigmaReparam")
            for r in results[f"{name}, {kind}"]
        ]
        half = len(entropies) // 2
        won += WORSE * median(ours) < median(plain)
        total += 1
        parts.append(
            f"{name}: {median(plain):.3g} -> {median(ours):.3g}, lowest entropy share "
            f"{median(entropies[:half]):.2f} -> {median(entropies[half:]):.2f}"
        )
    verdict = "reproduced" if won == total else "partly" if won else "not at this scale"
    return verdict, (
        "no weight decay in any; median test loss plain -> sigmaReparam: " + "; ".join(parts)
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
        tuple(v for v in _warmup_variants() if v.name == f"ViT, {OURS}"), _judge_rates,
    ),
    Claim(
        "4", "Collapse of attention precedes or accompanies the crash (Zhai et al. 2023, "
        "Figure 1; Qi et al. 2025, Figures 4, 8 to 10)", of(COLLAPSE), _judge_collapse,
        quick=("ViT, lr 3e-2, AdamW", "ViT, lr 3e-2, AdamW2"),
    ),
    Claim(
        "5", "Benign and malignant collapse occur and are told apart (Qi et al. 2025, "
        "Figure 3)",
        of(COLLAPSE), _judge_modes,
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

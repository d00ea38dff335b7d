"""Claim 1: AdamW2 needs no warmup."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

from recipes.evidence.claim import (
    WORSE,
    Claim,
    Results,
    Verdict,
    failures,
    losses,
    mostly_fails,
    short,
)
from recipes.evidence.runs import GPT2, SWIN, VIT, Variant

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


# Rounded, as people write rates: 0.1 * 0.03 is not 0.003.
CONTROLS = {
    model: replace(settings, learning_rate=float(f"{settings.learning_rate / 10:g}"))
    for model, settings in MODELS.items()
}


def warmup_variants() -> tuple[Variant, ...]:
    """Return the runs of each model under each kind of optimizer and schedule."""
    found = []
    for model, settings in MODELS.items():
        found += [
            Variant(f"{model}, {PLAIN}", settings),
            Variant(f"{model}, {WARMUP}", replace(settings, warmup=0.2)),
            Variant(f"{model}, {OURS}", replace(settings, optim="adamw2", optim_args=TAUS[model])),
            Variant(f"{model}, {CONTROL}", CONTROLS[model]),
        ]
    return tuple(found)


def _judge_warmup(results: Results) -> Verdict:
    shown, findings, why, as_good, worse = [], [], [], [], []
    models = [model for model in MODELS if f"{model}, {OURS}" in results]
    for model in models:
        plain, warm, ours = (
            mean(losses(results, f"{model}, {kind}")) for kind in (PLAIN, WARMUP, OURS)
        )
        against = _against_warmup(results, model, is_worse=ours > WORSE * warm)
        why += against
        shown += [model] * (not against)
        worse += [model] * (ours > WORSE * warm)
        finding = (
            f"{model}: test loss {short(plain)} with AdamW and no warmup, {short(warm)} with "
            f"warmup, {short(ours)} with AdamW2 and no warmup"
        )
        if f"{model}, {CONTROL}" in results:
            control = mean(losses(results, f"{model}, {CONTROL}"))
            finding += f", {short(control)} with AdamW at a tenth of the rate"
            if control <= WORSE * ours:
                as_good.append(model)
        findings.append(f"{finding}.")
    findings += [f"Against the claim: {reason}." for reason in why]
    if as_good:
        findings.append(
            "The lower rate alone comes within 5 % of AdamW2, or beats it, on "
            f"{', '.join(as_good)}."
        )
    sentence = (
        f"On {len(shown)} of {len(models)} models AdamW fails without warmup and trains with it, "
        "and AdamW2 without warmup does as well or better."
    )
    if len(shown) == len(models):
        word = "reproduced"
    elif shown:
        word = "partly"
    else:
        word = "refuted" if len(worse) == len(models) else "not at this scale"
    return Verdict(word, sentence, tuple(findings))


def _against_warmup(results: Results, model: str, *, is_worse: bool) -> list[str]:
    """Return why a model does not show that AdamW2 makes the warmup superfluous.

    To match a warmup says something only where AdamW fails without it and mostly trains with it.
    """
    why = [f"on {model} AdamW2 is worse than warmup"] * is_worse
    kinds = {PLAIN: "AdamW without warmup", WARMUP: "AdamW with warmup", OURS: "AdamW2"}
    for kind, method in kinds.items():
        name = f"{model}, {kind}"
        if mostly_fails(results, name) != (kind == PLAIN):
            count, total = failures(results, name), len(results[name])
            why.append(f"on {model} {method} fails in {count} of {total}")
    return why


CLAIM = Claim(
    "1", "AdamW2 needs no warmup",
    "AdamW2 without warmup matches or beats AdamW with warmup, while AdamW without "
    "warmup fails (Qi et al. 2025, Table 1)", warmup_variants(), _judge_warmup,
    quick=tuple(f"BERT, {kind}" for kind in (PLAIN, WARMUP, OURS)),
)  # fmt: skip

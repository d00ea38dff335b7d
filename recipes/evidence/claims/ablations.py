"""Claim 8: norms, power iterations, rate and tau, one changed at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import mean

from recipes.evidence import power_iterations
from recipes.evidence.claim import WORSE, Claim, Results, Verdict, loss_text, losses, mostly_fails
from recipes.evidence.claims.warmup import CONTROLS
from recipes.evidence.runs import GPT2, SHORT, STD_VIT, SWIN, VIT, Variant

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
    of_mean = partial(loss_text, results)

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


CLAIM = Claim(
    "8", "Norms, power iterations, tau",
    "Norms removed on all four architectures; power iterations; a grid of rates and tau",
    _ablation_variants(), _judge_ablations, appendix=power_iterations.section,
)  # fmt: skip

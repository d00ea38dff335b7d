"""What the contract asks of the monitor, of AdamW2, and of models without norms.

Each check takes the name of a tiny model and an empty folder; see `architecture_contract`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from architecture_inputs import padded
from attention_references import ENTROPY, attention_maps, reference_sigma_qk
from contract_checks import ITERATIONS
from contract_models import OTHER, SAME, fresh, output, patch
from exported_cases import auto_class_of, flatten, run_script
from power_bounds import ROUNDING, converged_at_least
from tiny_architectures import batch, outputs_of
from torch import Tensor, nn

import hf_stable
from hf_stable.adamw2.groups import parameter_rules
from hf_stable.architectures.finding import FoundLayer, find_blocks, find_layers, find_norms
from hf_stable.measures.matrices import local_matrices
from hf_stable.measures.parts import Parts
from hf_stable.methods.sigma_reparam.method import sigma_layers

HIDES_QUERIES = "deberta-v2"
"""Padding is hidden as keys and as queries there: its rows, uniform in the map, see nothing."""


def probed(name: str, folder: Path) -> str:
    """Entropy is that of the model's own maps, padded or not; the spectra are exact."""
    model = fresh(name)
    maps = attention_maps(fresh(name), batch(name))
    with warnings.catch_warnings(), hf_stable.probe(model, terms="all") as records:
        warnings.simplefilter("ignore", UserWarning)
        outputs_of(model, batch(name)).sum().backward()
    attentions = [each for block in find_blocks(model) for each, _ in block.attentions()]
    assert set(records.sigma_qk) == set(attentions) == set(maps)
    for layer, exact in reference_sigma_qk(model, maps).items():
        torch.testing.assert_close(records.sigma_qk[layer], exact, rtol=ROUNDING, atol=0)
    assert not records.missing
    if not records.entropy:
        return "spectra only"
    _compare_entropies(records, maps)
    if (inputs := padded(name)) is not None:
        shorter = attention_maps(fresh(name), inputs)
        if name == HIDES_QUERIES:
            blind = inputs["attention_mask"][:, None, :, None] == 0
            shorter = {
                layer: [m.masked_fill(blind, torch.nan) for m in each]
                for layer, each in shorter.items()
            }
        with torch.no_grad(), hf_stable.probe(model, terms=["entropy", "entropy_bound"]) as records:
            outputs_of(model, inputs)
        _compare_entropies(records, shorter)
        assert any(
            not torch.allclose(entropy_of(shorter[layer]), entropy_of(maps[layer]), rtol=1e-2)
            for layer in maps
        )
    bounded = {each.partition("@")[0] for each in records.entropy_bound}  # without the call
    changes = {
        change
        for block in find_blocks(model)
        for layer, attention in block.attentions()
        for change in block.logit_changes(attention)
        if layer not in bounded
    }
    assert bool(changes) == (bounded != set(attentions))
    return f"all but the bound: {', '.join(sorted(changes))}" if changes else "yes"


def entropy_of(maps: list[Tensor]) -> Tensor:
    """Mean entropy of each head over the rows that see a key and the calls of an attention."""
    return torch.stack([torch.special.entr(m).sum(-1).nanmean((0, 2)) for m in maps]).mean(0)


def _compare_entropies(records: Any, maps: dict[str, list[Tensor]]) -> None:
    calls = {
        layer if len(each) == 1 else f"{layer}@{number}": [one]
        for layer, each in maps.items()
        for number, one in enumerate(each, start=1)
    }
    assert set(records.entropy) == set(calls)
    for layer, found in records.entropy.items():
        torch.testing.assert_close(found, entropy_of(calls[layer]), **ENTROPY)
    for layer, bound in records.entropy_bound.items():
        entropy = records.entropy[layer]  # equal weights reach the bound
        assert (bound <= entropy * (1 + ENTROPY["rtol"]) + ENTROPY["atol"]).all(), layer


def bounded(name: str, folder: Path) -> str:
    """AdamW2 keeps every part of every matrix within tau, and knows what is exempt."""
    model = fresh(name)
    rules = parameter_rules(model)
    groups = hf_stable.parameter_groups(model, weight_decay=0.0)
    optimizer = hf_stable.AdamW2(groups, lr=1.0, tau=0.01, power_iterations=ITERATIONS)
    layers = [layer for layer in find_layers(model) if layer.weight is not None]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    assert all(rules[id(module.weight)]["tau"] == torch.inf for module in embeddings)
    for path, parameter in model.named_parameters():
        if "bias" in path.rpartition(".")[2]:  # zero at the start of a training
            assert rules[id(parameter)]["tau"] == torch.inf, path
    before = {layer.name: layer.weight.detach().clone() for layer in layers}
    outputs_of(model, batch(name)).square().mean().backward()
    optimizer.step()
    rates = optimizer.effective_lr()
    names = {id(parameter): each for each, parameter in model.named_parameters()}
    seen = 0
    for layer in layers:
        rule = rules.get(id(layer.weight), {})
        if rule.get("tau") == torch.inf or layer.weight.grad is None:
            continue
        seen += 1
        assert Parts.of(rule.get("parts", layer.parts)) == layer.parts
        sides = (before[layer.name], layer.weight.detach())
        pairs = list(zip(*(local_matrices(side, layer.parts) for side in sides), strict=True))
        own = rates[names[id(layer.weight)]]
        assert len(pairs) == (len(own) if isinstance(own, list) else 1), layer.name
        for old, new in pairs:
            _check_step(layer.name, old, new)
    assert seen
    fused = sorted({_fused(layer) for layer in layers if not layer.parts.is_whole})
    return f"each of {'; '.join(fused)}" if fused else "yes"


def _fused(layer: FoundLayer) -> str:
    roles = {"query": "q", "key": "k", "value": "v", "mlp_in": "gate and up", "mlp_out": "down"}
    names = ", ".join(dict.fromkeys(roles[role] for role in layer.roles))
    where = " per head" if layer.parts.is_interleaved else ""
    return names + (" of each expert" if layer.parts.stacked else where)


def _check_step(path: str, old: Tensor, new: Tensor) -> None:
    step = old - new
    moved = torch.linalg.matrix_norm(step, 2)
    if moved == 0:  # an expert that no token came to
        return
    start = torch.cos(torch.arange(1, step.shape[1] + 1).square().float())
    excess = moved / converged_at_least(step, start, ITERATIONS)
    assert moved <= 0.01 * torch.linalg.matrix_norm(old, 2) * excess * (1 + ROUNDING), path


def without_norms(name: str, folder: Path) -> str:
    """Norms of the blocks go by the methods that fit, and come back."""
    expected = output(fresh(name), name)
    methods = fitting_removals(fresh(name))
    assert methods and not hf_stable.describe(fresh(name)).removed_norms
    for method in methods:
        model = patch(fresh(name), method)
        answer = output(model, name)
        assert answer.isfinite().all()
        assert not torch.allclose(answer, expected, **OTHER)
        assert hf_stable.describe(model).removed_norms
        hf_stable.restore_layernorms(model)
        assert torch.equal(output(model, name), expected)
        assert not hf_stable.describe(model).removed_norms
    return ", ".join(methods)


def fitting_removals(model) -> list[str]:
    """The methods that take norms of a model's blocks out."""
    names = {"pre": "remove_pre_layernorm", "post": "remove_layernorm",
             "branch": "remove_layernorm"}  # fmt: skip
    placements = [norm.placement for norm in find_norms(model)]
    return sorted({names[each] for each in placements if each in names})


def exported(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Models without norms, and with sigma folded, load in a process that has no hf_stable.

    Returns:
        The auto class that loads each, by name; what went wrong, where something did.
    """
    cases = [_export(name, folder) for name in names]
    results = run_script(folder, cases)
    return {
        case["id"]: results[case["id"]]["error"] or case["auto_class"] or case["native_class"]
        for case in cases
    }


def _export(name: str, folder: Path) -> dict[str, Any]:
    model = fresh(name)
    patch(model, [*fitting_removals(model), "sigma_reparam"])
    with torch.no_grad():
        for _, layer in sigma_layers(model):
            layer.gamma.mul_(1.1)
    place = folder / re.sub(r"\W+", "-", name)
    hf_stable.export(model, place)
    torch.save(batch(name), f"{place}.in")
    with torch.no_grad():
        torch.save(flatten(model(**batch(name)).to_tuple()), f"{place}.out")
    return {
        "id": name, "folder": str(place), "auto_class": auto_class_of(model),
        "native_class": type(model).__name__, "standalone": True, "brief": True,
        "inputs": f"{place}.in", "outputs": f"{place}.out", "tolerance": SAME,
    }  # fmt: skip

"""What the contract asks of patching, training, saving and what comes after.

Each check takes the name of a tiny model and an empty folder; see `architecture_contract`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from architecture_inputs import labelled, leave_imports_out, loss_of, seed, trainer_for
from contract_models import OTHER, SAME, Trained, fresh, output, parts_of, patch, train, trained
from power_bounds import ROUNDING, converged_at_least, tracked_at_least
from tiny_architectures import batch, outputs_of
from tiny_training import losses, same_state
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_stable
from hf_stable.architectures.finding import find_layers
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.steps import refresh

ITERATIONS = 30
"""Power iterations after which sigma is asked to be nearly exact."""


def check_sigma(run: Trained) -> None:
    """Every gamma and sigma moved, and sigma is behind by no more than can be."""
    for path, layer in sigma_layers(run.model):
        assert not (layer.gamma == run.gammas[path]).any(), path
        assert not (layer.sigma == run.sigmas[path]).any(), path
        exact = torch.stack([torch.linalg.matrix_norm(m, 2) for m in parts_of(layer, layer.weight)])
        assert (layer.sigma <= exact * (1 + ROUNDING)).all(), path
        assert (layer.sigma >= tracked_at_least(exact, run.ways[path])).all(), path


def patched(name: str, folder: Path) -> str:
    """A patch changes no output, covers what it says, and sigma follows the weights."""
    plain = fresh(name)
    expected = output(plain, name)
    model = patch(plain)
    assert torch.equal(output(model, name), expected)
    run = trained(name)
    check_sigma(run)
    assert not torch.allclose(output(run.model, name), expected, **OTHER)

    model = copy.deepcopy(run.model)
    layers = dict(sigma_layers(model))
    starts = {path: layer.sigma_v.clone() for path, layer in layers.items()}
    for _ in range(ITERATIONS):
        refresh(list(layers.values()))
    for path, layer in layers.items():
        matrices = parts_of(layer, layer.weight)
        for matrix, start, sigma in zip(matrices, starts[path], layer.sigma, strict=True):
            least = converged_at_least(matrix, start[: matrix.shape[1]], ITERATIONS)
            assert least <= sigma <= torch.linalg.matrix_norm(matrix, 2) * (1 + ROUNDING), path
    return "yes"


def folded(name: str, folder: Path) -> str:
    """A trained model is saved plain, reloads in stock transformers, and folds in place."""
    plain = output(fresh(name), name)
    model = copy.deepcopy(trained(name).model)
    answer = output(model, name)
    model.save_pretrained(folder)
    stock, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    torch.testing.assert_close(output(stock.eval(), name), answer, **SAME)
    again = hf_stable.load(type(model), folder).eval()
    assert torch.equal(output(again, name), answer)
    hf_stable.fold(model)
    torch.testing.assert_close(output(model, name), answer, **SAME)
    assert not torch.allclose(answer, plain, **OTHER)
    assert kinds_of(model) == kinds_of(stock)
    assert model.state_dict().keys() == stock.state_dict().keys()
    return "yes"


def kinds_of(model) -> list[str]:
    """The classes of all modules, by name: torch makes one for each parametrised module."""
    return [type(module).__name__ for module in model.modules()]


def generated(name: str, folder: Path) -> str:
    """A patched model and the folded one generate the same tokens."""
    model = copy.deepcopy(trained(name).model)
    if not model.can_generate():
        return "no language model"
    tokens, logits = _generate(model, name)
    same, same_logits = _generate(hf_stable.fold(model), name)
    assert torch.equal(tokens, same)
    torch.testing.assert_close(logits, same_logits, **SAME)
    _, others = _generate(fresh(name), name)
    assert not torch.allclose(others[0], logits[0], **OTHER)
    return "yes"


def _generate(model, name: str) -> tuple[Tensor, Tensor]:
    given = {k: v for k, v in batch(name).items() if k != "decoder_input_ids"}
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    found = model.generate(
        **given, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def adapted(name: str, folder: Path) -> str:
    """LoRA trains on a folded model, and merges into plain layers."""
    import peft  # not above: the entries are also tested where there is none

    model = hf_stable.fold(copy.deepcopy(trained(name).model))
    kinds = kinds_of(model)
    answer = output(model, name)
    targets = [
        layer.name
        for layer in find_layers(model)
        if isinstance(layer.module, nn.Linear | Conv1D)
        and "head" not in layer.roles
        and not layer.bypassed
    ]
    seed()
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    # B is zero. Torch computes its own attention otherwise where weights are frozen.
    torch.testing.assert_close(output(adapter, name), answer, **SAME)
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(adapter, labelled(name)).backward()
        optimizer.step()
    adapted_answer = output(adapter, name)
    assert not torch.allclose(adapted_answer, answer, **SAME)
    merged = adapter.merge_and_unload()
    # W + B A is rounded once, where the adapter adds two products: an error of the size of the
    # largest of them, and so of the largest output.
    largest = adapted_answer.abs().max().clamp_min(1).item()
    torch.testing.assert_close(
        output(merged, name), adapted_answer, rtol=SAME["rtol"], atol=SAME["atol"] * largest
    )
    assert kinds_of(merged) == kinds
    return "yes"


def resumed(name: str, folder: Path) -> str:
    """The Trainer resumes bit for bit with dropout on, patched and plain."""
    _resume(name, folder / "plain", fresh(name, 0.1), fresh(name, 0.1))
    models = [patch(fresh(name, 0.1)) for _ in range(2)]
    _resume(name, folder / "patched", *models, optim="adamw2", bf16=True)
    del models
    leave_imports_out()
    return "yes"


def _resume(name: str, folder: Path, model: Any, twin: Any, **options: Any) -> None:
    whole = trainer_for(name, model.train(), folder, save_at=1, **options)
    whole.train()
    again = trainer_for(name, twin.train(), folder / "again", **options)
    assert not same_state(twin, model)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert losses(again)[2] == losses(whole)[2]
    assert len(losses(whole)) == 2
    assert same_state(twin, model)
    seed()
    first = outputs_of(model.train(), batch(name))
    assert not torch.equal(first, outputs_of(model, batch(name)))  # dropout is on


def in_bfloat16(name: str, folder: Path) -> str:
    """A model of bfloat16 weights is patched, trained, saved and reloaded as such."""
    plain = fresh(name, 0.0).to(torch.bfloat16).train()
    given = {
        key: value.to(torch.bfloat16) if value.is_floating_point() else value
        for key, value in batch(name).items()
    }
    seed()
    expected = outputs_of(plain, given)
    model = patch(plain)
    seed()
    assert torch.equal(outputs_of(model, given), expected)
    check_sigma(train(name, model))
    for _, layer in sigma_layers(model):
        assert {layer.gamma.dtype, layer.sigma.dtype, layer.sigma_v.dtype} == {torch.float32}
    model.save_pretrained(folder)
    stock = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    assert stock.dtype == torch.bfloat16
    assert same_state(stock, hf_stable.fold(copy.deepcopy(model)))
    again = hf_stable.load(type(model), folder, dtype=torch.bfloat16)
    assert same_state(again, model)
    return "yes"


def checkpointed(name: str, folder: Path) -> str:
    """Gradient checkpointing runs forwards again, and gives the same gradients."""
    model = patch(fresh(name, 0.1).train())
    if not model.supports_gradient_checkpointing:
        return "transformers has none for it"
    for part in model.modules():  # a cache lays keys out otherwise, and checkpointing has none
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for _, layer in sigma_layers(model):
        layer.register_forward_hook(count)
    seen = {}
    for kind in ("plain", "checkpointed"):
        if kind == "checkpointed":
            _enable_checkpointing(model)
        model.zero_grad()
        seed()
        calls = 0
        loss_of(model, labelled(name)).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        seen[kind] = calls, gradients
    assert seen["checkpointed"][0] > seen["plain"][0] > 0
    first, second = (seen[kind][1] for kind in ("plain", "checkpointed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    return "yes"


def _enable_checkpointing(model) -> None:
    # The older name warns in newer versions.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()

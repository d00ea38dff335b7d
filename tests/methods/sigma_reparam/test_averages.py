"""Averages of weights and teachers, made by `.data` or as state dicts: they compute with their own.

Whatever way the weights came in, the effective ones have gamma as their norm, and what is saved of
them is what a model with exactly these weights and gammas computes.
"""

from __future__ import annotations

import copy

import pytest
import torch
from reference import sigma_reparam_svd as reference
from tiny_models import sgd_steps, tiny_batch, tiny_model
from torch import nn

import hf_stable
from hf_stable.methods.sigma_reparam import triples
from hf_stable.methods.sigma_reparam.method import sigma_layers

# sigma by Lanczos or SVD in float32 against an SVD in float64, then a few products.
RTOL = 1e-4


def patched(model_type: str, init: str = "one") -> nn.Module:
    return hf_stable.patch(tiny_model(model_type), "sigma_reparam", init=init)


def trained_with_average(model_type: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model after some steps, and an average of its named parameters, as EMA libraries keep."""
    model = patched(model_type)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(6):
        sgd_steps(model, steps=1, lr=0.5)
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 0.3)
    return model, average


def exact_logits(model: nn.Module, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the plain model computes with `gamma / sigma1(W) * W` of these parameters."""
    plain = tiny_model(model.config.model_type)
    state = {n: t for n, t in parameters.items() if n in plain.state_dict()}
    for name, layer in sigma_layers(model):
        weight, gamma = (parameters[f"{name}.{part}"].double() for part in ("weight", "gamma"))
        blocks = weight.chunk(layer.num_parts, layer.parts.dim)
        scaled = [
            g / torch.linalg.svdvals(block.flatten(1))[0] * block
            for g, block in zip(gamma, blocks, strict=True)
        ]
        state[f"{name}.weight"] = torch.cat(scaled, layer.parts.dim).float()
    plain.load_state_dict(state, strict=False)
    return logits(plain)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_batch(model)).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).norm() <= RTOL * expected.norm()


def copy_to(model: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data.copy_(parameters[name])


MODELS = pytest.mark.parametrize("model_type", ["gpt2", "vit"])


@MODELS
def test_a_saved_average_of_parameters_is_that_of_its_own_weights(model_type, tmp_path):
    model, average = trained_with_average(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=average)
    plain = type(model).from_pretrained(tmp_path)
    assert_close(logits(plain), exact_logits(model, average))
    again = hf_stable.load(type(model), tmp_path)
    assert_close(logits(again), exact_logits(model, average))
    assert (logits(plain) - logits(model)).norm() > 0.05 * logits(model).norm()
    for name, tensor in model.state_dict().items():  # the model itself stays
        assert torch.equal(tensor, before[name]), name


@MODELS
def test_a_saved_average_of_a_whole_state_dict_too(model_type, tmp_path):
    model = patched(model_type)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(6):
        sgd_steps(model, steps=1, lr=0.5)
        for name, tensor in model.state_dict().items():
            average[name].lerp_(tensor, 0.3)
    stale = [
        average[f"{name}.sigma"] / reference_sigma(average[f"{name}.weight"], layer)
        for name, layer in sigma_layers(model)
    ]
    assert max((ratio - 1).abs().max().item() for ratio in stale) > 1e-3  # an average of sigmas
    model.save_pretrained(tmp_path, state_dict=average)
    assert_close(logits(type(model).from_pretrained(tmp_path)), exact_logits(model, average))
    model.load_state_dict(average)
    assert_close(logits(model), exact_logits(model, average))


def reference_sigma(weight: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    blocks = reference.blocks_of(weight.double(), layer.num_parts, layer.parts.dim)
    return torch.stack([torch.linalg.svdvals(block)[0] for block in blocks])


@MODELS
@pytest.mark.parametrize("way", ["save", "fold", "state_dict"])
def test_weights_written_through_data_are_saved_as_they_are(model_type, way, tmp_path):
    model, average = trained_with_average(model_type)
    copy_to(model, average)  # in the midst of training: no switch of modes tells of it
    expected = exact_logits(model, average)
    if way == "fold":
        hf_stable.fold(model)
    elif way == "save":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    else:
        state, model = model.state_dict(), patched(model_type)
        model.load_state_dict(state)
    assert_close(logits(model), expected)


@MODELS
def test_an_evaluation_between_two_sets_of_weights_notices_both(model_type):
    model, average = trained_with_average(model_type)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits(model)  # the mode is switched before the weights are
    for parameters in (average, own, average):
        copy_to(model, parameters)
        for _ in range(2):
            assert_close(logits(model), exact_logits(model, parameters))
    assert (exact_logits(model, own) - exact_logits(model, average)).norm() > 0.05


@MODELS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_teacher_that_follows_by_data_computes_with_its_own_weights(model_type, training):
    student = patched(model_type)
    teacher = copy.deepcopy(student).requires_grad_(False).train(training)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    first = {name: p.clone() for name, p in teacher.named_parameters()}
    for step in range(5):
        batch = tiny_batch(student, seed=step)
        with torch.no_grad():
            seen = teacher(**batch).logits
        current = {name: p.detach().clone() for name, p in teacher.named_parameters()}
        twin = copy.deepcopy(teacher)  # a copy settles by all of its values
        with torch.no_grad():
            assert_close(seen, twin(**batch).logits)
        optimizer.zero_grad()
        student(**batch).loss.backward()
        optimizer.step()
        for mine, its in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.data.mul_(0.5).add_(its.detach().data, alpha=0.5)
    assert_close(logits(teacher), exact_logits(teacher, dict(teacher.named_parameters())))
    stale = patched(model_type)
    assert (exact_logits(stale, current) - exact_logits(stale, first)).norm() > 0.01


def test_a_weight_that_stays_is_looked_at_without_moving_anything(monkeypatch):
    model = patched("gpt2").eval().requires_grad_(False)
    logits(model)
    before = [[getattr(m, n).clone() for n in m.SIGMA_TENSORS] for _, m in sigma_layers(model)]
    settled = []
    monkeypatch.setattr(triples, "settle", lambda layer: settled.append(layer))
    for _ in range(3):
        logits(model)
    assert not settled
    for (_, layer), tensors in zip(sigma_layers(model), before, strict=True):
        assert all(
            torch.equal(getattr(layer, name), tensor)
            for name, tensor in zip(layer.SIGMA_TENSORS, tensors, strict=True)
        )
    model.transformer.h[1].mlp.c_fc.weight.data.mul_(2)
    logits(model)
    assert settled == [model.transformer.h[1].mlp.c_fc]


def test_training_does_not_look(monkeypatch):
    """It would wait for a GPU in every layer, and each step tells what it has moved."""
    model = patched("vit")
    monkeypatch.setattr(triples, "_some_entries", lambda weight: pytest.fail("looked"))
    sgd_steps(model)

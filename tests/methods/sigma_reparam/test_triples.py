"""Sigma follows its weight whatever changes it: averages, plain state dicts, other processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import sgd_steps, tiny_batch, tiny_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hf_stable
from hf_stable import UnsupportedModelError
from hf_stable.measures.matrices import local_matrices
from hf_stable.methods.sigma_reparam import triples as settling
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.triples import settle

# A float32 SVD against the Lanczos or SVD of the layer, and products of a few thousand entries.
ROUNDING = 2e-5


def patched(model_type: str = "gpt2", **options: Any) -> nn.Module:
    return hf_stable.patch(tiny_model(model_type), "sigma_reparam", **options)


def exact_weight(layer) -> torch.Tensor:
    """The effective weight with sigma by a full SVD of the weight as it is."""
    blocks = local_matrices(layer.weight.detach(), layer.parts)
    scaled = [
        block * (gamma / torch.linalg.matrix_norm(block, 2))
        for block, gamma in zip(blocks, layer.gamma.detach(), strict=True)
    ]
    return torch.cat(scaled, layer.parts.dim).view_as(layer.weight)


def with_exact_sigmas(model: nn.Module) -> nn.Module:
    """The plain model that a patched one should compute, made without its sigma buffers."""
    weights = {name: exact_weight(layer) for name, layer in sigma_layers(model)}
    plain = hf_stable.fold(copy.deepcopy(model))
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data.copy_(weight)
    return plain


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return model(**tiny_batch(model, seed=9)).loss.item()


def staleness(model: nn.Module) -> float:
    """The largest relative error of an effective weight."""
    return max(
        (
            (layer.effective_weight() - exact_weight(layer)).norm() / exact_weight(layer).norm()
        ).item()
        for _, layer in sigma_layers(model)
    )


def assert_settled(model: nn.Module) -> None:
    assert loss(model) == pytest.approx(loss(with_exact_sigmas(model)), rel=ROUNDING)
    assert staleness(model) < ROUNDING


def triples(model: nn.Module) -> list[torch.Tensor]:
    parts = ("sigma", "sigma_u", "sigma_v")
    return [getattr(layer, part).clone() for _, layer in sigma_layers(model) for part in parts]


def train_with_average(average: AveragedModel, model: nn.Module, *, optimizer: Any) -> None:
    for step in range(6):
        optimizer.zero_grad()
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        average.update_parameters(model)


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.5),
    "fused-adamw": lambda params: torch.optim.AdamW(params, lr=0.02, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_computes_what_its_own_weights_say(
    monkeypatch, model_type, use_buffers, optimizer
):
    def run() -> nn.Module:
        model = patched(model_type, init="one")
        average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers
        )
        train_with_average(average, model, optimizer=OPTIMIZERS[optimizer](model.parameters()))
        return average.module

    assert_settled(run())
    # The twin: without the check, the averaged model is another function.
    monkeypatch.setattr(settling, "settle", lambda layer: None)
    assert staleness(run()) > 100 * ROUNDING


def test_an_average_made_by_hand_is_followed_step_by_step():
    model = patched()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(4):
        optimizer.zero_grad()
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, new in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(new, 0.3)
        assert_settled(average)


def test_weights_swapped_through_data_are_noticed_at_eval_and_train():
    model = patched()
    before = [p.detach().clone() for p in model.parameters()]
    sgd_steps(model, lr=0.5)
    trained = [p.detach().clone() for p in model.parameters()]
    for values, mode in ((before, False), (trained, True)):
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.data.copy_(value)
        model.train(mode)
        assert_settled(model)


def test_refresh_covers_what_leaves_no_trace():
    model = patched()
    sgd_steps(model)
    for _, layer in sigma_layers(model):
        layer.weight.data.mul_(3.0)
    stale = triples(model)
    loss(model)
    assert all(map(torch.equal, triples(model), stale))
    assert hf_stable.refresh(model) is model
    assert_settled(model)


def test_a_loop_without_an_optimizer_is_followed():
    model = patched()
    for step in range(3):
        model.zero_grad()
        model(**tiny_batch(model, seed=step)).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
        assert_settled(model)


def test_an_assigned_weight_is_noticed():
    model = patched()
    _, layer = sigma_layers(model)[0]
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    assert_settled(model)


# State dicts


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("init", ["spectral", "one"])
def test_a_plain_state_dict_brings_its_function(model_type, init, assign):
    source = patched(model_type, init="one")
    sgd_steps(source, lr=0.5)
    hf_stable.fold(source)
    model = patched(model_type, init=init)
    assert abs(loss(model) - loss(source)) > 1e-4
    result = model.load_state_dict(source.state_dict(), strict=False, assign=assign)
    assert not result.unexpected_keys
    assert not result.missing_keys  # gamma and sigma are those of the weights now
    assert loss(model) == pytest.approx(loss(source), rel=ROUNDING)
    assert_settled(model)


def test_a_state_dict_without_the_triple_keeps_its_gamma():
    source = patched(init="one")
    sgd_steps(source, lr=0.5)
    state = {key: value for key, value in source.state_dict().items() if ".sigma" not in key}
    model = patched()
    model.load_state_dict(state, strict=False)
    for (_, mine), (_, theirs) in zip(sigma_layers(model), sigma_layers(source), strict=True):
        assert torch.equal(mine.gamma, theirs.gamma)
    assert_settled(model)


def test_a_whole_state_dict_keeps_the_triple_of_a_running_training(model_type):
    source = patched(model_type)
    sgd_steps(source, lr=0.5)
    model = patched(model_type)
    model.load_state_dict(source.state_dict())
    assert loss(model) == loss(source)
    assert all(map(torch.equal, triples(model), triples(source)))
    # One power iteration a step leaves vectors that are not exact yet: replacing them would show.
    for _, layer in sigma_layers(model):
        layer.sigma += 1.0
        settle(layer)
    assert not all(map(torch.equal, triples(model), triples(source)))


def test_a_stale_model_is_saved_and_folded_settled(tmp_path):
    model = patched()
    sgd_steps(model, lr=0.5)
    with torch.no_grad():
        for _, layer in sigma_layers(model):
            layer.weight.mul_(3.0)
    other = copy.deepcopy(model)
    expected = loss(with_exact_sigmas(model))
    model.save_pretrained(tmp_path)
    assert loss(type(model).from_pretrained(tmp_path)) == pytest.approx(expected, rel=ROUNDING)
    assert loss(hf_stable.fold(other)) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(
    ("put_on", "take_off"),
    [
        (
            lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
            lambda layer: prune.remove(layer, "weight"),
        ),
        (
            parametrizations.weight_norm,
            lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        ),
    ],
    ids=["pruned", "weight-normed"],
)
def test_a_weight_that_is_computed_from_others_is_refused(put_on, take_off, tmp_path):
    model = patched("vit", init="one")
    layer = model.vit.layers[0].mlp.fc1
    put_on(layer)
    uses = (
        lambda: model(**tiny_batch(model)),
        lambda: model.save_pretrained(tmp_path),
        lambda: hf_stable.fold(model),
        lambda: hf_stable.refresh(model),
    )
    for use in uses:
        with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.fc1' is no parameter"):
            use()
    take_off(layer)
    hf_stable.refresh(model)
    assert staleness(model) < ROUNDING
    before = layer.sigma.clone()
    sgd_steps(model, lr=0.5)
    assert not torch.equal(layer.sigma, before)


# What must not move


def test_looking_moves_nothing_in_a_running_training(model_type):
    def run(*, evaluating: bool) -> list[torch.Tensor]:
        model = patched(model_type)
        for _ in range(3):
            sgd_steps(model, steps=2, lr=0.5)
            if evaluating:
                model.eval()
                loss(model)
                copy.deepcopy(model)(**tiny_batch(model))
                model.state_dict()
                hf_stable.refresh(model)
                model.train()
        return [*triples(model), *(p.detach() for p in model.parameters())]

    assert all(map(torch.equal, run(evaluating=True), run(evaluating=False)))


def late_model(model_type: str = "gpt2") -> nn.Module:
    """A model in training, whose sigma is some percent behind its weights."""
    model = patched(model_type)
    sgd_steps(model, lr=3.0)
    assert staleness(model) > 0.05
    return model.eval()


def effective_weights(model: nn.Module) -> list[torch.Tensor]:
    return [layer.effective_weight().detach().float() for _, layer in sigma_layers(model)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_rounds_the_weights_of_a_running_training_and_moves_no_sigma(dtype, tmp_path):
    model = late_model()
    expected = effective_weights(model)
    there = copy.deepcopy(model).to(dtype)
    back = copy.deepcopy(there).float()
    state = patched().to(dtype).eval()
    state.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = hf_stable.load(type(model), tmp_path, dtype=dtype)
    # A weight is rounded when it is cast, its product with a scale once more, and the scale moves
    # by less than one rounding.
    rounding = 3 * torch.finfo(dtype).eps / 2
    for cast in (there, back, state, loaded):
        for got, whole in zip(effective_weights(cast), expected, strict=True):
            # float16 has fewer digits below 6e-5; entries here are of order 0.1.
            torch.testing.assert_close(got, whole, rtol=rounding, atol=1e-6)


def test_a_cast_hides_no_weight_that_has_moved_before():
    model = patched().eval()
    before = effective_weights(model)
    for _, layer in sigma_layers(model):
        layer.weight.data.mul_(3)
    cast = model.to(torch.bfloat16)
    assert staleness(cast.float()) < 0.01  # three roundings to bfloat16, of 0.2 % each
    for got, whole in zip(effective_weights(cast), before, strict=True):
        # The same three roundings; atol is a thousandth of what entries are.
        torch.testing.assert_close(got, whole, rtol=0.01, atol=1e-4)


def test_a_weight_that_turned_non_finite_shows_and_heals():
    model = patched()
    _, layer = sigma_layers(model)[0]
    good, vectors = layer.weight.detach().clone(), layer.sigma_v.clone()
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    assert torch.isnan(layer.effective_weight()).any()
    assert torch.equal(layer.sigma_v, vectors)
    with torch.no_grad():
        layer.weight.copy_(good)
    assert_settled(model)


def test_weights_under_inference_mode_pass():
    trained = patched().eval()
    with torch.inference_mode():
        model = copy.deepcopy(trained)  # as a load there gives it
        assert all(p.is_inference() for p in model.parameters())
        plain = with_exact_sigmas(model)
        assert loss(model) == pytest.approx(loss(plain), rel=ROUNDING)


def test_functional_calls_leave_the_buffers_alone():
    model = patched("vit")
    before = triples(model)
    params = {name: p.detach() * 2 for name, p in model.named_parameters()}
    inputs = tiny_batch(model)
    torch.func.functional_call(model, params, kwargs=inputs)
    torch.func.grad(lambda p: torch.func.functional_call(model, p, kwargs=inputs).loss)(params)
    assert all(map(torch.equal, triples(model), before))


def _train_in_child(model: nn.Module) -> None:
    torch.set_num_threads(1)
    sgd_steps(model, lr=0.5)


@pytest.mark.slow
def test_shared_memory_is_trained_by_another_process():
    model = patched()
    model.share_memory()
    assert all(layer.sigma_v.is_shared() for _, layer in sigma_layers(model))
    before = loss(model)
    child = torch.multiprocessing.get_context("spawn").Process(
        target=_train_in_child, args=(model,)
    )
    child.start()
    child.join()
    assert child.exitcode == 0
    assert abs(loss(model) - before) > 1e-4
    alone = patched()
    sgd_steps(alone, lr=0.5)
    assert loss(model) == loss(alone)

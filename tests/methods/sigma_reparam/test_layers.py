"""The sigma layers one by one, against the SVD-based reference: outputs, precision, copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from reference import sigma_reparam_svd as reference
from single_layers import moved_layer, plain_output, sigma_layer
from torch import nn

from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.steps import live_layers


@pytest.mark.parametrize("few", [False, True], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no grad"])
def test_outputs_equal_the_reference(made, few, training, grad_mode):
    plain, _, inputs = made
    inputs = inputs[:1, :2] if few and inputs.ndim == 3 else inputs
    layer = moved_layer(made).train(training)
    with torch.set_grad_enabled(grad_mode):
        output = layer(inputs)
    torch.testing.assert_close(output, plain_output(plain, layer, inputs))
    assert (output - plain(inputs)).norm() > 0.1 * output.norm()
    # One token takes the way that scales the output; a stray shape or dtype would show here.
    assert output.shape == plain(inputs).shape and output.dtype == inputs.dtype


def test_gradients_equal_plain_autograd(made):
    plain, _, inputs = made
    layer = moved_layer(made)
    leaves = list(layer.parameters())
    target = torch.randn_like(layer(inputs))
    inputs = inputs.requires_grad_()
    ours = torch.autograd.grad((layer(inputs) * target).sum(), [*leaves, inputs])
    theirs = plain_output(plain, layer, inputs)
    if plain.bias is not None:
        plain.bias.data = layer.bias  # the same leaf
    expected = torch.autograd.grad(
        (theirs * target).sum(), [p for p in leaves if p is not layer.bias] + [inputs]
    )
    ours = [g for g, p in zip(ours, [*leaves, inputs], strict=True) if p is not layer.bias]
    for mine, its in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_the_effective_weight_has_gamma_as_its_norm(made):
    layer = sigma_layer(made)
    with torch.no_grad():
        layer.gamma.copy_(torch.linspace(0.3, 2.0, layer.num_parts))
        effective = layer.effective_weight()
    for block, raw, gamma in zip(
        reference.blocks_of(effective, layer.num_parts, layer.parts.dim),
        reference.blocks_of(layer.weight, layer.num_parts, layer.parts.dim),
        layer.gamma.tolist(),
        strict=True,
    ):
        assert reference.svd_triple(block)[0].item() == pytest.approx(gamma, rel=1e-5)
        assert reference.svd_triple(raw)[0].item() != pytest.approx(gamma, rel=1e-2)


def test_init_one_is_the_paper_and_init_spectral_the_identity(made):
    plain, num_parts, _ = made
    one, spectral = sigma_layer(made, init="one"), sigma_layer(made, init="spectral")
    assert torch.equal(one.gamma, torch.ones(num_parts))
    assert torch.equal(spectral.gamma, spectral.sigma)
    assert torch.equal(spectral.effective_weight(), plain.weight)
    assert not torch.allclose(one.effective_weight(), plain.weight)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_init_spectral_changes_no_bit_of_a_scaled_weight(made, training):
    plain, _, inputs = made
    layer = sigma_layer(made).train(training)
    assert torch.equal(layer(inputs), plain(inputs))
    with torch.no_grad():
        assert torch.equal(layer(inputs), plain(inputs))  # 40 tokens, 12 features
        layer.gamma.mul_(1.01)
        assert not torch.equal(layer(inputs), plain(inputs))


def test_init_spectral_is_one_rounding_off_where_activations_are_scaled(made):
    plain, _, inputs = made
    layer = sigma_layer(made).eval()
    inputs = inputs[:1, :2] if inputs.ndim == 3 else inputs
    with torch.no_grad():
        # The bias is added after the product instead of inside it.
        size = plain(inputs).abs() + (0 if plain.bias is None else plain.bias.abs().max())
        error = (layer(inputs) - plain(inputs)).abs()
    assert (error <= 2 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_without_gradients_in_training_is_the_one_with(made, dtype):
    """Reentrant checkpointing runs both, and they have to agree to the last bit."""
    _, _, inputs = made
    # As a matrix: torch multiplies a 3-D input in another way when it wants a gradient.
    inputs = (inputs[0, :2] if inputs.ndim == 3 else inputs).to(dtype)
    layer = moved_layer(made).to(dtype)
    with torch.no_grad():
        without = layer(inputs)
    assert torch.equal(without, layer(inputs))


def test_an_empty_batch_passes(made):
    _, _, inputs = made
    layer = moved_layer(made).eval()  # whose parts have scales of their own
    with torch.no_grad():
        assert layer(inputs[:0]).shape[0] == 0
    layer.train()(inputs[:0]).sum().backward()
    assert not layer.weight.grad.any()


# Precision


def test_autocast_keeps_gradients_and_the_triple_in_float32(made):
    plain, _, inputs = made
    layer = moved_layer(made)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs)
    assert output.dtype == torch.bfloat16
    expected = plain_output(plain, layer, inputs)
    assert (output - expected).norm() <= 2**-7 * expected.norm()
    layer.eval()
    few = inputs[:1, :2] if inputs.ndim == 3 else inputs
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scaled = layer(few)
    expected = plain_output(plain, layer, few)
    assert scaled.dtype == torch.bfloat16
    assert (scaled - expected).norm() <= 2**-7 * expected.norm()
    output.float().square().sum().backward()
    assert layer.weight.grad.dtype == layer.gamma.grad.dtype == torch.float32
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


CASTS = {
    "bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16, torch.float32),
    "half": (lambda m: m.half(), torch.float16, torch.float32),
    "double": (lambda m: m.double(), torch.float64, torch.float64),
    "double, then half": (lambda m: m.double().half(), torch.float16, torch.float32),
    "bfloat16, then float": (lambda m: m.bfloat16().float(), torch.float32, torch.float32),
}


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize(("cast", "weights", "spectra"), CASTS.values(), ids=CASTS)
def test_casting_a_model_keeps_gamma_and_the_triple_precise(
    made, cast, weights, spectra, with_gradients
):
    _, _, inputs = made
    layer = moved_layer(made)
    expected = layer(inputs)
    if with_gradients:
        expected.square().sum().backward()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    cast(nn.Sequential(layer))
    assert layer.weight.dtype == weights
    assert isinstance(layer.gamma, nn.Parameter) and layer.gamma.requires_grad
    was_rounded = weights == torch.float32 and not torch.equal(layer.weight, before["weight"])
    for name in SigmaLayer.SIGMA_TENSORS:
        value = getattr(layer, name)
        assert value.dtype == spectra
        if name == "sigma" and was_rounded:  # of the rounded weight: by bfloat16's half a digit
            torch.testing.assert_close(value, before[name], rtol=2**-9, atol=0)
        else:
            assert torch.equal(value.float(), before[name])
    if with_gradients:
        assert layer.gamma.grad.dtype == spectra and layer.weight.grad.dtype == weights
    output = layer(inputs.to(weights))
    assert output.dtype == weights
    assert (output.float() - expected).norm() <= 2**-6 * expected.norm()
    layer.zero_grad()
    output.float().square().sum().backward()
    assert layer.gamma.grad.dtype == spectra


def test_a_half_precision_weight_is_rounded_once(made):
    layer = moved_layer(made).bfloat16()
    exact = reference.effective_weight(
        layer.weight.double(),
        layer.gamma.double(),
        layer.sigma_u.double(),
        layer.sigma_v.double(),
        layer.parts.dim,
    )
    layer.sigma.copy_(
        reference.sigma_of(layer.weight.float(), layer.sigma_u, layer.sigma_v, layer.parts.dim)
    )
    ours = layer.effective_weight()
    assert ours.dtype == torch.bfloat16
    differing = (ours != exact.bfloat16()).float().mean()
    assert differing < 0.01  # a scale rounded to bfloat16 first would move most entries


def test_installing_on_half_precision_starts_precise(made):
    plain, num_parts, inputs = made
    plain = plain.bfloat16()
    layer = sigma_layer((plain, num_parts, inputs))
    assert layer.gamma.dtype == layer.sigma.dtype == torch.float32
    assert torch.equal(layer(inputs.bfloat16()), plain(inputs.bfloat16()))


# Copies, pickles, life


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(_saved(m), weights_only=False),
}


def _saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_is_equal_apart_and_alive(made, duplicate):
    _, _, inputs = made
    layer = moved_layer(made)
    twin = duplicate(nn.ModuleList([layer]))[0]
    assert type(twin) is type(layer) and torch.equal(twin(inputs), layer(inputs))
    alive = live_layers()
    assert any(other is twin for other in alive) and any(other is layer for other in alive)
    assert twin.serial_number > layer.serial_number
    with torch.no_grad():
        twin.gamma.zero_()
        twin.sigma_u.zero_()
    assert layer.gamma.all() and layer.sigma_u.any()


def test_a_layer_is_held_by_its_model_alone(made):
    layer = sigma_layer(made)
    number = layer.serial_number
    assert number in [other.serial_number for other in live_layers()]
    del layer
    gc.collect()
    assert number not in [other.serial_number for other in live_layers()]


def test_state_dict_keys_are_pinned(made):
    layer = sigma_layer(made)
    expected = {"weight", "gamma", "sigma", "sigma_u", "sigma_v"}
    assert set(layer.state_dict()) == expected | ({"bias"} if made[0].bias is not None else set())
    assert {name for name, _ in layer.named_parameters()} == set(layer.state_dict()) - {
        "sigma", "sigma_u", "sigma_v",
    }  # fmt: skip
    rows, columns = reference.blocks_of(layer.weight, layer.num_parts, layer.parts.dim)[0].shape
    assert layer.gamma.shape == layer.sigma.shape == (layer.num_parts,)
    assert layer.sigma_u.shape == (layer.num_parts, rows)
    assert layer.sigma_v.shape == (layer.num_parts, columns)


def test_state_dict_round_trip(made):
    _, _, inputs = made
    trained, fresh = moved_layer(made), sigma_layer(made)
    assert not torch.allclose(trained(inputs), fresh(inputs))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(trained(inputs), fresh(inputs))


def test_layers_print_what_they_are(made):
    plain, num_parts, _ = made
    text = repr(sigma_layer(made))
    assert text.startswith(f"Sigma{type(plain).__name__}(")
    assert repr(plain)[:-1] in text and f"sigma_parts={num_parts}" in text

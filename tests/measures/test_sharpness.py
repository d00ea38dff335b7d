"""Sharpness against quadratics whose Hessian is known, and full Hessians of tiny models."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_stable.measures.sharpness import adam_preconditioner, measure_sharpness, sharpness_threshold
from hf_stable.methods.patching import patch


def quadratic(eigenvalues, seed=0):
    """A loss 1/2 x^T H x with the given spectrum, and its H."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.linalg.qr(
        torch.randn(size, size, generator=generator, dtype=torch.float64)
    ).Q.float()
    hessian = (basis * torch.tensor(eigenvalues)) @ basis.T
    x = torch.randn(size, generator=generator).requires_grad_()
    return x, hessian, lambda: 0.5 * x @ hessian @ x


@pytest.mark.parametrize(
    "eigenvalues",
    [[3.0], [5.0, 1.0, 0.1], [2.0, -7.0, 1.0], [-1.0, -2.0], [4.0, 4.0, 4.0, 1.0]],
    ids=["one", "positive", "saddle", "downwards", "repeated"],
)
def test_quadratics_are_exact(eigenvalues):
    x, _, loss = quadratic(eigenvalues)
    result = measure_sharpness(loss, [x], tolerance=1e-6)
    assert result.converged
    assert result.num_products <= len(eigenvalues)
    assert result.value == pytest.approx(max(eigenvalues), rel=1e-5)


def test_a_long_spectrum_converges_without_kept_vectors():
    eigenvalues = [10.0] + torch.linspace(9.0, -3.0, 199).tolist()
    x, _, loss = quadratic(eigenvalues)
    result = measure_sharpness(loss, [x], tolerance=1e-3, max_products=60)
    assert result.converged
    assert result.value == pytest.approx(10.0, rel=2e-3)
    early = measure_sharpness(loss, [x], max_products=2)
    assert not early.converged
    assert early.num_products == 2


def test_preconditioned_quadratic():
    x, hessian, loss = quadratic([5.0, 1.0, 0.1, -2.0])
    diagonal = torch.tensor([0.1, 2.0, 0.5, 1.0])
    expected = torch.linalg.eigvals(torch.diag(1 / diagonal) @ hessian).real.max().item()
    got = measure_sharpness(loss, [x], preconditioner=[diagonal], tolerance=1e-6)
    assert got.value == pytest.approx(expected, rel=1e-4)
    assert abs(got.value - 5.0) > 1


def test_parameters_that_the_loss_ignores_or_is_linear_in():
    x, _, loss = quadratic([5.0, 1.0])
    unused = torch.ones(3, requires_grad=True)
    linear = torch.ones(2, requires_grad=True)
    result = measure_sharpness(lambda: loss() + linear.sum(), [unused, x, linear], tolerance=1e-6)
    assert result.value == pytest.approx(5.0, rel=1e-5)
    assert measure_sharpness(lambda: linear.sum(), [linear]).value == 0


def full_hessian(loss_fn, params):
    sizes = [p.numel() for p in params]
    gradients = torch.autograd.grad(loss_fn(), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    rows = []
    for entry in flat:
        row = torch.autograd.grad(
            entry, params, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([r.flatten() for r in row]))
    assert len(rows) == sum(sizes)
    return torch.stack(rows)


def test_equals_the_full_hessian_of_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(0, 3, (16,))
    params = list(model.parameters())

    def loss():
        return nn.functional.cross_entropy(model(x), y)

    expected = torch.linalg.eigvalsh(full_hessian(loss, params))[-1].item()
    got = measure_sharpness(loss, params, tolerance=1e-5)
    assert got.converged
    assert got.value == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is None for p in params)


def small_vit():
    model = tiny_model("vit", num_hidden_layers=1, hidden_size=8, intermediate_size=8)
    batch = tiny_batch(model, size=2)
    batch["pixel_values"] = batch["pixel_values"].double()
    return model.double(), lambda: model(**batch).loss


def test_equals_the_full_hessian_of_attention_with_its_fused_kernel():
    model, loss = small_vit()
    attention = model.vit.layers[0].attention
    params = [attention.q_proj.weight, attention.k_proj.bias, attention.v_proj.bias]
    for p in params:
        p.data += torch.randn_like(p)
    assert model.config._attn_implementation == "sdpa"
    got = measure_sharpness(loss, params, tolerance=1e-4, max_products=60)
    model.set_attn_implementation("eager")
    expected = torch.linalg.eigvalsh(full_hessian(loss, params))[-1].item()
    assert got.value == pytest.approx(expected, rel=1e-3)


def test_gradient_checkpointing_changes_nothing():
    model, loss = small_vit()
    params = list(model.parameters())
    plain = measure_sharpness(loss, params, max_products=8)
    calls = []
    layer = model.vit.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(
        forward, *args, use_reentrant=False, **kwargs
    )
    got = measure_sharpness(loss, params, max_products=8)
    assert len(calls) > 8  # recomputed for every product, by the same kernel of attention
    assert got.value == pytest.approx(plain.value, rel=1e-9)


def test_patched_model_against_differences_of_its_gradient():
    model, loss = small_vit()
    patch(model, "sigma_reparam")
    layer = model.vit.layers[0].mlp.fc2
    params = [layer.weight, layer.gamma]
    layer.weight.data += 0.1 * torch.randn_like(layer.weight)

    def gradient():
        # The layer reads sigma = u^T W v, which an optimizer step would refresh.
        layer.sigma.copy_((layer.sigma_u @ layer.weight @ layer.sigma_v.T)[0].detach())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(), params)])

    rows, step = [], 1e-5
    for p in params:
        for entry in range(p.numel()):
            values = []
            for sign in (1, -1):
                p.data.view(-1)[entry] += sign * step
                values.append(gradient())
                p.data.view(-1)[entry] -= sign * step
            rows.append((values[0] - values[1]) / (2 * step))
    gradient()
    hessian = torch.stack(rows)
    torch.testing.assert_close(hessian, hessian.T, atol=1e-7, rtol=1e-5)
    expected = torch.linalg.eigvalsh(hessian)[-1].item()
    got = measure_sharpness(loss, params, tolerance=1e-5, max_products=80)
    assert got.value == pytest.approx(expected, rel=1e-4)


def test_dropout_is_drawn_once_and_the_random_state_given_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).train()
    x = torch.randn(16, 4)
    params = list(model.parameters())
    state = torch.get_rng_state()

    def loss():
        return model(x).square().mean()

    first = measure_sharpness(loss, params)
    assert torch.equal(torch.get_rng_state(), state)
    assert measure_sharpness(loss, params) == first
    torch.rand(1)
    assert measure_sharpness(loss, params).value != first.value


def test_adam_diverges_above_its_threshold_and_not_below():
    """The threshold is a fact about the optimizer: train on either side of it."""
    for share, grows in ((0.9, False), (1.1, True)):
        # eps far above every gradient keeps P at (1 - beta1^t) eps, which 200 steps bring to eps.
        x = torch.full((1,), 1e-8, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=1e-12, betas=(0.9, 0.999), eps=1.0)
        (1.5 * x.square().sum()).backward()
        for _ in range(200):
            optimizer.step()
        diagonal = adam_preconditioner(optimizer, [x])
        sharpness = measure_sharpness(
            lambda x=x: 1.5 * x.square().sum(), [x], preconditioner=diagonal
        ).value
        assert sharpness == pytest.approx(3.0, rel=1e-6)
        optimizer.param_groups[0]["lr"] = share * sharpness_threshold(1.0, 0.9) / sharpness
        for _ in range(100):
            optimizer.zero_grad()
            (1.5 * x.square().sum()).backward()
            optimizer.step()
        assert (abs(x.item()) > 1e-6) == grows
        assert (abs(x.item()) < 1e-8) == (not grows)


def test_adam_preconditioner_is_what_adam_divides_by():
    torch.manual_seed(0)
    x = torch.randn(5, 3, requires_grad=True)
    optimizer = torch.optim.AdamW([x], lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0)
    for _ in range(4):
        optimizer.zero_grad()
        (x**4).sum().backward()
        before = x.detach().clone()
        optimizer.step()
    (diagonal,) = adam_preconditioner(optimizer, [x])
    update = 0.1 * optimizer.state[x]["exp_avg"] / diagonal
    torch.testing.assert_close(before - x.detach(), update)


def test_thresholds():
    assert sharpness_threshold(0.1) == pytest.approx(20)
    assert sharpness_threshold(0.1, beta1=0.9) == pytest.approx(380)
    assert sharpness_threshold(0.1, beta1=0.0) == pytest.approx(20)


def test_non_finite_losses_give_nan():
    x = torch.zeros(2, requires_grad=True)
    result = measure_sharpness(lambda: (x / 0 * x).sum(), [x])
    assert math.isnan(result.value)
    assert not result.converged


def test_bad_input_is_named():
    x, _, loss = quadratic([5.0, 1.0])
    with pytest.raises(ValueError, match="no parameters"):
        measure_sharpness(loss, [])
    with pytest.raises(ValueError, match="needs no gradient"):
        measure_sharpness(loss, [x, torch.ones(2)])
    with pytest.raises(ValueError, match="one tensor per parameter"):
        measure_sharpness(loss, [x], preconditioner=[torch.ones(3)])
    with pytest.raises(ValueError, match="SGD has no second moment"):
        adam_preconditioner(torch.optim.SGD([x], lr=1), [x])
    with pytest.raises(ValueError, match="has no second moment"):
        adam_preconditioner(torch.optim.Adam([x], lr=1), [x])

"""The scaled weight and its derivatives of first and second order, against plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import sigma_reparam_svd as reference
from single_layers import equal_parts
from tiny_models import tiny_batch, tiny_model
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import hf_stable
from hf_stable.methods.sigma_reparam import part_arithmetic
from hf_stable.methods.sigma_reparam.function import (
    effective_weight,
    scaled_linear,
    scales_in_product,
)
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.swapping import install, prepare

CASES = {  # shape of the weight, number of blocks, dimension along which they lie
    "one block": ((5, 4), 1, 0),
    "three blocks of rows": ((6, 4), 3, 0),
    "three blocks of columns": ((4, 6), 3, 1),
    "convolution kernel": ((3, 2, 2, 2), 1, 0),
    "one row": ((1, 4), 1, 0),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    """weight and gamma that want gradients, constants u and v, dim; float64, far from converged."""
    shape, num_blocks, dim = request.param
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    gamma = torch.rand(num_blocks, generator=generator, dtype=torch.float64, requires_grad=True)
    u, v = reference.svd_vectors(weight.detach(), num_blocks, dim)
    u = nn.functional.normalize(u + 0.3 * torch.randn(u.shape, generator=generator), dim=1)
    v = nn.functional.normalize(v + 0.3 * torch.randn(v.shape, generator=generator), dim=1)
    return weight, gamma, u, v, dim


def scaled(weight, gamma, u, v, dim):
    """The pure function of (W, gamma, u, v): the layers hand in the value of sigma beside them."""
    sigma = reference.sigma_of(weight.detach(), u, v, dim)
    return effective_weight(weight, gamma, sigma, u, v, equal_parts(len(u), dim))


def hessian_product(function, weight, gamma, seed=5):
    """Product of the Hessian of a loss on W_hat with a fixed direction in (W, gamma)."""
    generator = torch.Generator().manual_seed(seed)
    output = function(weight, gamma)
    target = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    loss = (output * target).sum() + (output**3).sum()
    grads = torch.autograd.grad(loss, (weight, gamma), create_graph=True)
    inner = sum((g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in grads)
    return torch.autograd.grad(inner, (weight, gamma))


def test_value_equals_the_reference(case):
    torch.testing.assert_close(scaled(*case), reference.effective_weight(*case))
    assert not torch.allclose(scaled(*case), case[0])


def test_first_derivatives_in_every_mode(case):
    weight, gamma, *rest = case
    torch.autograd.gradcheck(
        lambda w, g: scaled(w, g, *rest),
        (weight, gamma),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


def test_second_derivatives_in_every_mode(case):
    weight, gamma, *rest = case
    torch.autograd.gradgradcheck(
        lambda w, g: scaled(w, g, *rest),
        (weight, gamma),
        check_fwd_over_rev=True,
        check_batched_grad=True,
    )


def test_only_the_wanted_gradient_is_computed(case):
    weight, gamma, *rest = case
    both = torch.autograd.grad(scaled(weight, gamma, *rest).sin().sum(), (weight, gamma))
    alone = torch.autograd.grad(scaled(weight, gamma.detach(), *rest).sin().sum(), weight)
    other = torch.autograd.grad(scaled(weight.detach(), gamma, *rest).sin().sum(), gamma)
    assert torch.equal(both[0], alone[0]) and torch.equal(both[1], other[0])


class SavedConstant(torch.autograd.Function):
    """What must not be: sigma as a saved number. Its first derivative is right."""

    @staticmethod
    def forward(ctx, weight, gamma, sigma, u, v):
        ctx.save_for_backward(weight, gamma, sigma, u, v)
        return gamma / sigma * weight

    @staticmethod
    def backward(ctx, g):
        weight, gamma, sigma, u, v = ctx.saved_tensors
        inner = (g * weight).sum() / sigma
        return gamma / sigma * (g - inner * torch.outer(u[0], v[0])), inner, None, None, None


def test_hessian_equals_plain_autograd_and_a_saved_sigma_would_not():
    torch.manual_seed(0)
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    gamma = torch.rand(1, dtype=torch.float64, requires_grad=True)
    u, v = reference.svd_vectors(weight)
    sigma = reference.sigma_of(weight, u, v).detach()
    expected = hessian_product(lambda w, g: reference.effective_weight(w, g, u, v), weight, gamma)
    ours = hessian_product(lambda w, g: effective_weight(w, g, sigma, u, v), weight, gamma)
    torch.testing.assert_close(ours, expected)

    def constant(w, g):
        return SavedConstant.apply(w, g, sigma, u, v)

    first = torch.autograd.grad(constant(weight, gamma).sin().sum(), weight)
    right = torch.autograd.grad(effective_weight(weight, gamma, sigma, u, v).sin().sum(), weight)
    torch.testing.assert_close(first, right)
    wrong = hessian_product(constant, weight, gamma)
    assert (wrong[0] - expected[0]).norm() > 0.1 * expected[0].norm()


def test_second_derivatives_stay_float32_under_autocast():
    torch.manual_seed(0)
    weight = torch.randn(64, 48, requires_grad=True)
    gamma = torch.rand(1, requires_grad=True)
    u, v = reference.svd_vectors(weight.detach())
    outside = hessian_product(lambda w, g: scaled(w, g, u, v, 0), weight, gamma)
    with torch.autocast("cpu", torch.bfloat16):
        # The reference's own products are taken outside; only ours run in here.
        sigma = torch.stack([u[0].dot(weight.detach().mul(v[0]).sum(1))])
        inside = hessian_product(lambda w, g: effective_weight(w, g, sigma, u, v), weight, gamma)
        assert (weight @ weight.T).dtype == torch.bfloat16
    for ours, expected in zip(inside, outside, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


# A whole model, against the plain one with weights scaled by plain autograd


@pytest.fixture(scope="module")
def trained():
    """A patched float64 ViT that has trained a little, its plain twin, a batch, parameters."""
    # Eager attention: torch's fused kernels have no second and no forward derivative.
    plain = tiny_model("vit", attn_implementation="eager").double()
    patched = copy.deepcopy(plain)
    hf_stable.patch(patched, "sigma_reparam", init="one")
    pixels = tiny_batch(patched)["pixel_values"].double()
    optimizer = torch.optim.SGD(patched.parameters(), lr=0.1)
    for _ in range(3):
        patched(pixel_values=pixels).logits.square().mean().backward()
        optimizer.step()
    for layer in patched.modules():
        if isinstance(layer, SigmaLayer):
            layer.sigma.copy_(
                reference.sigma_of(
                    layer.weight.detach(), layer.sigma_u, layer.sigma_v, layer.parts.dim
                )
            )
    parameters = {name: p.detach() for name, p in patched.named_parameters()}
    return plain, patched, pixels, parameters


def losses(trained):
    """The same loss by the patched model and by the reference, as functions of (p, pixels)."""
    plain, patched, _, _ = trained

    def ours(parameters, pixels):
        logits = functional_call(patched, parameters, kwargs={"pixel_values": pixels}).logits
        return logits.sin().mean() + logits.square().mean()

    def expected(parameters, pixels):
        batch = {"pixel_values": pixels}
        logits = reference.reference_outputs(plain, patched, parameters, batch).logits
        return logits.sin().mean() + logits.square().mean()

    return ours, expected


def assert_trees_close(ours, expected):
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            ours[name], expected[name], rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def direction(parameters):
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in parameters.items()
    }


def test_func_grad_of_a_vit(trained):
    ours, expected = (grad(f)(trained[3], trained[2]) for f in losses(trained))
    assert_trees_close(ours, expected)
    assert all(ours[name].abs().max() > 0 for name in ours if name.endswith("gamma"))


def test_vmap_of_grad_of_a_vit_gives_gradients_per_example(trained):
    _, _, pixels, parameters = trained
    each = [
        vmap(grad(f), in_dims=(None, 0))(parameters, pixels.unsqueeze(1)) for f in losses(trained)
    ]
    assert_trees_close(*each)
    gamma = next(each[0][name] for name in each[0] if name.endswith("gamma"))
    assert len(gamma) == len(pixels) and not torch.allclose(gamma[0], gamma[1])


def test_vmap_over_stacked_models(trained):
    _, _, pixels, parameters = trained
    stacked = {n: torch.stack([p, p + 0.01, 0.9 * p]) for n, p in parameters.items()}
    ours, expected = (vmap(grad(f), in_dims=(0, None))(stacked, pixels) for f in losses(trained))
    # sigma of the copies is the layer's own in both: only its derivative tells W's copies apart.
    first = {name: value[0] for name, value in ours.items()}
    assert_trees_close(first, {name: value[0] for name, value in expected.items()})


def test_jvp_over_grad_of_a_vit(trained):
    _, _, pixels, parameters = trained
    tangent = direction(parameters)
    ours, expected = (
        jvp(lambda p, f=f: grad(f)(p, pixels), (parameters,), (tangent,))[1]
        for f in losses(trained)
    )
    assert_trees_close(ours, expected)


def test_hessian_vector_product_of_a_vit_by_plain_backward(trained):
    _, _, pixels, parameters = trained
    tangent = direction(parameters)

    def product(loss):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        grads = torch.autograd.grad(loss(leaves, pixels), list(leaves.values()), create_graph=True)
        inner = sum((g * t).sum() for g, t in zip(grads, tangent.values(), strict=True))
        return dict(zip(leaves, torch.autograd.grad(inner, list(leaves.values())), strict=True))

    ours, expected = (product(f) for f in losses(trained))
    assert_trees_close(ours, expected)
    assert max(value.abs().max() for value in ours.values()) > 1e-3


@pytest.mark.parametrize("num_examples", [1, 4])  # fewer tokens than features, and more
@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_jvp_of_a_vit(trained, num_examples, grad_mode, training):
    plain, patched, pixels, parameters = trained
    tangent = direction(parameters)
    try:
        for model in (plain, patched):
            model.train(training)
        with torch.set_grad_enabled(grad_mode):
            ours, expected = (
                jvp(lambda p, f=f: f(p, pixels[:num_examples]), (parameters,), (tangent,))[1]
                for f in losses(trained)
            )
    finally:
        for model in (plain, patched):
            model.train()
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-12)
    assert ours.abs() > 1e-3


# The product that scales


def product_arguments(num_blocks, dim, num_tokens, has_bias):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    weight = draw(*((6, 4) if dim == 0 else (4, 6)))
    u, v = reference.svd_vectors(weight.detach(), num_blocks, dim)
    u = nn.functional.normalize(u + 0.3 * torch.randn(u.shape, generator=generator), dim=1)
    differentiable = draw(2, num_tokens // 2, 4), weight, draw(6) if has_bias else None
    return (*differentiable, draw(num_blocks)), (u, v, dim)


def by_product(x, weight, bias, gamma, u, v, dim):
    sigma = reference.sigma_of(weight.detach(), u, v, dim)
    return scaled_linear(x, weight, bias, gamma, sigma, u, v, equal_parts(len(u), dim))


def by_reference(x, weight, bias, gamma, u, v, dim):
    scaled_weight = reference.effective_weight(weight, gamma, u, v, dim)
    output = x @ (scaled_weight if dim == 1 else scaled_weight.T)
    return output if bias is None else output + bias


# <dL/dx, x> stands in for <G, W> where there are fewer tokens than outputs.
@pytest.mark.parametrize("num_tokens", [4, 8], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_the_product_that_scales_equals_the_reference(num_blocks, dim, has_bias, num_tokens):
    inputs, constants = product_arguments(num_blocks, dim, num_tokens, has_bias)
    wanted = [tensor for tensor in inputs if tensor is not None]
    expected, ours = by_reference(*inputs, *constants), by_product(*inputs, *constants)
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        assert torch.equal(by_product(*inputs, *constants), ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sin().sum(), wanted),
        torch.autograd.grad(expected.sin().sum(), wanted),
    )
    torch.autograd.gradgradcheck(lambda *args: by_product(*args, *constants), inputs)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_batched_gradients_of_the_product_that_scales(num_blocks):
    inputs, constants = product_arguments(num_blocks, 0, 4, True)
    torch.autograd.gradcheck(
        lambda *args: by_product(*args, *constants), inputs, check_batched_grad=True
    )


def test_a_gamma_of_zero_still_gets_its_gradient():
    inputs, constants = product_arguments(1, 0, 4, True)
    inputs[-1].data.zero_()
    ours = torch.autograd.grad(by_product(*inputs, *constants).sin().sum(), inputs)
    expected = torch.autograd.grad(by_reference(*inputs, *constants).sin().sum(), inputs)
    torch.testing.assert_close(ours, expected)
    assert ours[-1].abs() > 1e-3


def test_the_product_scales_in_eager_mode_on_a_cpu_alone():
    x, weight, gamma = torch.randn(3, 4), torch.randn(6, 4), torch.ones(1)
    assert scales_in_product(x, weight, gamma)
    assert not scales_in_product(x.to("meta"), weight.to("meta"), gamma.to("meta"))
    assert not scales_in_product(x.bfloat16(), weight.bfloat16(), gamma)
    assert not scales_in_product(x, weight.double(), gamma.double())
    with torch.autocast("cpu"):
        assert not scales_in_product(x, weight, gamma)
    inside = []
    vmap(lambda row: inside.append(scales_in_product(x, weight, gamma)) or row)(x)
    with torch.autograd.forward_ad.dual_level():
        inside.append(scales_in_product(x, weight, gamma))
    assert inside == [False, False]


# Memory


class LargeAllocations(TorchDispatchMode):
    """Keeps every new storage of at least so many bytes that an operation returns."""

    def __init__(self, num_bytes, known):
        super().__init__()
        self.num_bytes = num_bytes
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                if storage.nbytes() >= self.num_bytes and storage.data_ptr() not in self.known:
                    self.found[storage.data_ptr()] = storage  # held, so that no address is reused
        return outputs


def count_large(layer, forward, tokens):
    known = list(layer.state_dict(keep_vars=True).values())
    with LargeAllocations(layer.weight.nbytes // 2, known) as mode:
        output = forward(tokens)
        in_forward = len(mode.found)
        if output.requires_grad:
            output.sum().backward()
    return in_forward, len(mode.found) - in_forward


LAYERS = {
    "Linear": (lambda: nn.Linear(1024, 1024), 1),
    "Linear, three blocks": (lambda: nn.Linear(1024, 1536), 3),
    "Conv1D": (lambda: Conv1D(1024, 1024), 1),
    "Conv1D, three blocks": (lambda: Conv1D(1536, 1024), 3),
}


@pytest.mark.parametrize(("build", "num_parts"), LAYERS.values(), ids=LAYERS)
def test_no_temporary_of_the_size_of_the_weight(build, num_parts):
    torch.manual_seed(0)
    layer = build()
    install(layer, prepare(layer, parts=equal_parts(num_parts)), [])
    tokens = torch.randn(8, 1024)
    # Backward: dL/dW_hat, which the matrix product makes and in whose memory dL/dW is written.
    assert count_large(layer, layer, tokens) == (0, 1)
    layer.zero_grad()

    def by_scaled_weight(inputs):
        weight = layer.effective_weight()
        return inputs @ (weight if isinstance(layer, Conv1D) else weight.T) + layer.bias

    # Where the product cannot scale. Forward: W_hat. Backward: dL/dW_hat and dL/dW.
    assert count_large(layer, by_scaled_weight, tokens) == (1, 2)
    layer.zero_grad()

    def plainly(inputs):
        weight = reference.effective_weight(
            layer.weight, layer.gamma, layer.sigma_u, layer.sigma_v, layer.parts.dim
        )
        return inputs @ (weight if isinstance(layer, Conv1D) else weight.T) + layer.bias

    in_forward, in_backward = count_large(layer, plainly, tokens)
    assert in_forward + in_backward > 3, "the count would not see a temporary"
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):  # W_hat is formed, and its bfloat16 copy is torch's
        in_forward, in_backward = count_large(layer, layer, tokens)
    assert in_forward <= 2 and in_backward <= 3
    with torch.no_grad():
        layer.eval()
        assert count_large(layer, layer, tokens) == (0, 0)  # it scales the activations


def test_a_diverging_gradient_becomes_infinite_as_other_arithmetic_does():
    grad, u, v = torch.randn(4, 3), torch.full((4,), 0.5), torch.tensor([1.0, 0.0, 0.0])
    out = torch.empty_like(grad)
    # 1e30 * 1e20 is a Python number, and none of float32.
    vectors = (u[None], v[None], equal_parts(1))
    part_arithmetic.write_minus_rank_one(out, grad, [1e30], [1e20], *vectors)
    assert torch.isinf(out[:, 0]).all() and (out[:, 0] < 0).all()
    part_arithmetic.write_minus_rank_one(out, grad, [2.0], [3.0], *vectors)
    torch.testing.assert_close(out, 2 * (grad - 3 * torch.outer(u, v)))

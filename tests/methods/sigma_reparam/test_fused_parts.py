"""A fused layer, however its parts lie, does what a layer for each part would do."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_stable.measures.parts import Parts
from hf_stable.methods.sigma_reparam.folding import fold_layer
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.steps import install_hooks
from hf_stable.methods.sigma_reparam.stored_parts import PARTS_TENSOR, parts_of_stored
from hf_stable.methods.sigma_reparam.swapping import install, prepare
from hf_stable.methods.sigma_reparam.triples import mark_moved, settle

CASES = {  # rows of each part, and where they lie
    "thirds": ((6, 6, 6), Parts((1, 1, 1))),
    "fewer key heads": ((16, 4, 4), Parts((4, 1, 1))),
    "gate and up": ((10, 10), Parts((1, 1))),
    "per head": ((6, 6, 6), Parts((1, 1, 1), repeats=3)),
    "per group of heads": ((8, 4, 4), Parts((2, 1, 1), repeats=2)),
}
WIDTH = 5


@pytest.fixture(params=CASES.values(), ids=CASES)
def layout(request):
    return request.param


@pytest.fixture(params=[nn.Linear, Conv1D])
def pair(layout, request):
    """Sigma layers: one fused, and one for each of its parts, all with gammas off their sigmas."""
    heights, parts = layout
    torch.manual_seed(0)
    is_transposed = request.param is Conv1D
    parts = replace(parts, dim=int(is_transposed))
    *apart, fused = (
        Conv1D(height, WIDTH).double() if is_transposed else nn.Linear(WIDTH, height).double()
        for height in (*heights, sum(heights))
    )
    for index, each in enumerate(apart):
        nn.init.normal_(each.weight, std=0.3 * (1 + index))
        nn.init.normal_(each.bias)
    rows = Parts(parts.shares, parts.repeats).views(fused.bias.data[:, None])
    for view, row, each in zip(parts.views(fused.weight.data), rows, apart, strict=True):
        view.copy_(each.weight.data.view(view.shape))
        row.copy_(each.bias.data.view(row.shape))
    install(fused, prepare(fused, parts=parts), [])
    for each in apart:
        install(each, prepare(each), [])
    gammas = torch.linspace(0.5, 2.0, len(apart))
    with torch.no_grad():
        fused.gamma.copy_(gammas)
        for each, gamma in zip(apart, gammas, strict=True):
            each.gamma.fill_(gamma)
    return fused, apart


def outputs_by_part(fused, x):
    parts = Parts(fused.parts.shares, fused.parts.repeats)
    output = fused(x)
    return [m.T for m in parts.matrices(output.flatten(0, -2).T)]


def weights_by_part(fused, tensor):
    return fused.parts.matrices(tensor)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_the_parts(pair, tokens, training):
    fused, apart = pair
    torch.manual_seed(1)
    x = torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for layer in (fused, *apart):
        layer.train(training)
    mine, theirs = outputs_by_part(fused, x), [each(y).flatten(0, -2) for each in apart]
    assert_same(mine, theirs)
    for outputs in (mine, theirs):
        sum((i + 1) * output.sin().sum() for i, output in enumerate(outputs)).backward()
    assert_same([x.grad], [y.grad])
    assert_same(weights_by_part(fused, fused.weight.grad), [each.weight.grad for each in apart])
    assert_same(fused.gamma.grad, [each.gamma.grad[0] for each in apart])
    with torch.no_grad():
        assert_same(outputs_by_part(fused, x), theirs)


def test_second_derivatives_are_those_of_the_parts(pair):
    fused, apart = pair
    norms = []
    for layers in ([fused], apart):
        sizes = [layer.effective_weight().sin().sum() for layer in layers]
        parameters = [layer.weight for layer in layers]
        first = torch.autograd.grad(sum(sizes), parameters, create_graph=True)
        (sum(g.square().sum() for g in first)).backward()
        norms.append(sum(w.grad.square().sum() for w in parameters))
    torch.testing.assert_close(*norms, rtol=1e-9, atol=1e-11)


def test_steps_move_each_triple_as_alone(pair):
    install_hooks()
    fused, apart = pair
    torch.manual_seed(1)
    start = [sigma.item() for sigma in fused.sigma]
    optimizers = [
        torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)
        for layers in ([fused], apart)
    ]
    for _ in range(3):
        x = torch.randn(8, WIDTH, dtype=torch.float64)
        for optimizer, outputs in zip(
            optimizers, (outputs_by_part(fused, x), [each(x) for each in apart]), strict=True
        ):
            optimizer.zero_grad()
            sum(output.square().sum() for output in outputs).backward()
            optimizer.step()
    assert all(abs(s.item() - begun) > 1e-3 for s, begun in zip(fused.sigma, start, strict=True))
    assert_same(fused.sigma, [each.sigma[0] for each in apart])
    assert_same(weights_by_part(fused, fused.weight), [each.weight for each in apart])
    for u, v, each in zip(fused.sigma_u, fused.sigma_v, apart, strict=True):
        assert_same([u[: each.sigma_u.shape[1]]], each.sigma_u)
        assert_same([v[: each.sigma_v.shape[1]]], each.sigma_v)


def test_a_weight_that_was_moved_gets_the_sigmas_of_its_parts(pair):
    fused, apart = pair
    with torch.no_grad():
        for layer in (fused, *apart):
            layer.weight.mul_(3).add_(0.01)
            mark_moved(layer)
            settle(layer)
    assert_same(fused.sigma, [each.sigma[0] for each in apart])
    exact = [torch.linalg.matrix_norm(w, 2) for w in weights_by_part(fused, fused.weight)]
    assert_same(fused.sigma, exact)


def test_folding_is_folding_of_the_parts(pair):
    fused, apart = pair
    raw, parts = fused.weight.detach().clone(), fused.parts
    for layer in (fused, *apart):
        fold_layer(layer)
    assert not isinstance(fused, SigmaLayer) and PARTS_TENSOR not in fused.state_dict()
    assert not torch.equal(fused.weight, raw)
    assert_same(parts.matrices(fused.weight), [each.weight for each in apart])


def test_files_tell_the_parts(pair):
    fused, _ = pair
    copied = copy.deepcopy(fused)
    assert copied.parts == fused.parts
    state = fused.state_dict()
    told = parts_of_stored(fused.weight.shape, state["sigma_u"].shape, state.get(PARTS_TENSOR))
    assert told == fused.parts
    equal = len(set(fused.parts.shares)) == 1 and not fused.parts.is_interleaved
    assert (PARTS_TENSOR in state) != equal

"""Turning plain layers into sigma layers and back: what is prepared, kept and refused."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import sigma_reparam_svd as reference
from single_layers import equal_parts, moved_layer, sigma_layer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_stable.methods.sigma_reparam.folding import fold_layer
from hf_stable.methods.sigma_reparam.layers import SigmaConv1D, SigmaConv2d, SigmaLinear
from hf_stable.methods.sigma_reparam.steps import live_layers
from hf_stable.methods.sigma_reparam.swapping import SIGMA_CLASSES, install, prepare


def test_preparing_touches_nothing_and_installing_keeps_identities(made):
    plain, num_parts, _ = made
    before, weight = copy.deepcopy(plain.__dict__), plain.weight
    state = prepare(plain, parts=equal_parts(num_parts), name="a.b")
    assert type(plain) in SIGMA_CLASSES and plain.__dict__.keys() == before.keys()
    assert torch.equal(plain.weight, before["_parameters"]["weight"])
    layer = install(plain, state, [])
    assert layer is plain and layer.weight is weight and layer.layer_name == "a.b"
    assert isinstance(layer, SigmaLinear | SigmaConv1D | SigmaConv2d)


@pytest.mark.parametrize("fused", [1, 3])
def test_prepared_triples_are_exact(fused):
    torch.manual_seed(0)
    layer = Conv1D(450, 160)
    state = prepare(layer, parts=equal_parts(fused))
    for block, sigma, u, v in zip(
        layer.weight.chunk(fused, 1), state.sigma, state.u, state.v, strict=True
    ):
        exact = reference.svd_triple(block)
        assert sigma.item() == pytest.approx(exact[0].item(), rel=3e-6)
        assert abs(u.double() @ exact[1]).item() == pytest.approx(1, abs=1e-5)
        assert abs(v.double() @ exact[2]).item() == pytest.approx(1, abs=1e-5)


def test_gamma_is_frozen_where_the_weight_is(made):
    made[0].weight.requires_grad_(False)
    assert not sigma_layer(made).gamma.requires_grad
    made[0].weight.requires_grad_(True)
    assert sigma_layer(made).gamma.requires_grad


def test_folding_at_once_gives_the_weight_back_bit_for_bit(made):
    plain, _, _ = made
    layer = sigma_layer(made)
    weight = layer.weight
    folded = fold_layer(layer)
    assert folded is layer and type(folded) is type(plain) and folded.weight is weight
    assert torch.equal(folded.weight, plain.weight)
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert folded.__dict__.keys() == plain.__dict__.keys()
    assert not any(other is folded for other in live_layers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_folding_after_training_keeps_the_function(made, dtype):
    plain, _, inputs = made
    layer = moved_layer(made).to(dtype)
    inputs = inputs.to(dtype)
    raw, effective, output = layer.weight.clone(), layer.effective_weight(), layer(inputs)
    folded = fold_layer(layer)
    assert torch.equal(folded.weight, effective)
    # The layer may scale the product where the folded one has scaled the weight.
    torch.testing.assert_close(folded(inputs), output)
    assert not torch.equal(folded.weight, raw)
    assert folded.weight.requires_grad and folded.weight.is_leaf


class LinearOfSomebodyElse(nn.Linear):
    pass


@pytest.mark.parametrize(
    "layer",
    [LinearOfSomebodyElse(3, 3), nn.Embedding(3, 3), nn.ConvTranspose1d(3, 3, 1), nn.LayerNorm(3)],
    ids=lambda layer: type(layer).__name__,
)
def test_other_types_are_refused(layer):
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    with pytest.raises(TypeError, match=f"cannot reparametrise x.y of type {kind}; allowed"):
        prepare(layer, name="x.y")


def test_a_sigma_layer_is_not_prepared_twice(made):
    with pytest.raises(TypeError, match="cannot reparametrise"):
        prepare(sigma_layer(made))


def test_a_zero_part_is_refused():
    layer = nn.Linear(4, 6)
    with torch.no_grad():
        layer.weight[2:4] = 0
    with pytest.raises(ValueError, match=r"head: its \(6, 4\) weight has an all-zero"):
        prepare(layer, parts=equal_parts(3), name="head")
    assert prepare(layer).sigma > 0  # as a whole it is no zero matrix


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_refused(made, value):
    with torch.no_grad():
        made[0].weight.view(-1)[3] = value
    with pytest.raises(ValueError, match="cannot reparametrise a layer: .* NaN or infinite"):
        prepare(made[0], parts=equal_parts(made[1]))

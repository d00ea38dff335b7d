"""State dicts of patched models, parted into plain weights and the raw state."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch.distributed.tensor import Replicate, distribute_tensor
from trained_models import logits_of, trained

import hf_stable
from hf_stable.checkpoints.state_dicts import fold_state_dict
from hf_stable.methods.sigma_reparam.method import sigma_layers


def test_sharded_values_are_gathered_before_folding():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = trained("gpt2")
        sharded = {
            key: distribute_tensor(value.detach(), mesh, [Replicate()])
            for key, value in model.state_dict().items()
        }
        folded, raw = fold_state_dict(model, sharded)
    finally:
        torch.distributed.destroy_process_group()
    expected, expected_raw = fold_state_dict(model, model.state_dict())
    assert all(torch.equal(folded[key], expected[key]) for key in expected)
    assert all(torch.equal(raw[key], expected_raw[key]) for key in expected_raw)


def test_folding_rounds_once_from_float32():
    model = hf_stable.patch(tiny_model("vit").to(torch.bfloat16), "sigma_reparam", init="one")
    name, layer = sigma_layers(model)[0]
    exact = layer.weight.double() * (layer.gamma.double() / layer.sigma.double())
    saved = fold_state_dict(model, model.state_dict())[0][f"{name}.weight"]
    assert saved.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's 8 bits, and a little for the float32 product.
    assert ((saved.double() - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.parametrize("strict", [True, False])
def test_plain_weights_are_taken_as_what_they_are(strict, model_type):
    plain = tiny_model(model_type, seed=7).eval()
    model = trained(model_type)
    before = logits_of(model)
    result = model.load_state_dict(plain.state_dict(), strict=strict)
    assert not result.missing_keys and not result.unexpected_keys
    # gamma is sigma, and a product with 1 is not rounded.
    torch.testing.assert_close(logits_of(model), logits_of(plain), rtol=0, atol=0)
    assert not torch.allclose(logits_of(model), before, rtol=1e-2)
    for _, layer in sigma_layers(model):
        assert torch.equal(layer.gamma, layer.sigma)


def test_a_weight_that_is_missing_is_still_said_to_be(model_type):
    plain = tiny_model(model_type).state_dict()
    model = trained(model_type)
    name = f"{sigma_layers(model)[0][0]}.weight"
    del plain[name]
    with pytest.raises(RuntimeError, match=f"(?s)Missing key.*{name}.*gamma"):
        model.load_state_dict(plain)

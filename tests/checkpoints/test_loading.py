"""Loading a patched model back exactly."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import sgd_steps
from tiny_training import same_state
from trained_models import logits_of, trained

import hf_stable
from hf_stable.methods.sigma_reparam.method import sigma_layers


@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_load_gives_the_patched_model_back(model_type, size, tmp_path):
    model = trained(model_type)
    model.save_pretrained(tmp_path, max_shard_size=size)
    auto = {
        "gpt2": transformers.AutoModelForCausalLM,
        "bert": transformers.AutoModelForMaskedLM,
    }.get(model_type, transformers.AutoModelForImageClassification)
    for model_class in (type(model), auto):
        loaded = hf_stable.load(model_class, tmp_path)
        assert same_state(model, loaded)
        assert hf_stable.describe(loaded).configs == hf_stable.describe(model).configs
        assert torch.equal(logits_of(loaded), logits_of(model))
    assert hf_stable.patch(loaded, "sigma_reparam") is loaded  # the same config: a no-op
    # It keeps training as the original does.
    assert sgd_steps(loaded.train()) == sgd_steps(model.train())
    assert same_state(model, loaded)
    assert not same_state(model, hf_stable.load(type(model), tmp_path))


def test_load_keeps_options_and_fits_the_base_model(tmp_path):
    model = trained("gpt2", fused_qkv="joint", exclude=["*.mlp.*"])
    model.save_pretrained(tmp_path)
    base = hf_stable.load(transformers.GPT2Model, tmp_path)
    assert len(sigma_layers(base)) == len(sigma_layers(model)) == 4
    assert torch.equal(base.h[0].attn.c_attn.gamma, model.transformer.h[0].attn.c_attn.gamma)
    assert base.h[0].attn.c_attn.num_parts == 1


def test_load_in_another_dtype(tmp_path):
    model = trained("vit")
    model.save_pretrained(tmp_path)
    loaded = hf_stable.load(type(model), tmp_path, dtype=torch.bfloat16)
    for (_, layer), (_, original) in zip(sigma_layers(loaded), sigma_layers(model), strict=True):
        assert torch.equal(layer.weight, original.weight.bfloat16())
        assert torch.equal(layer.gamma, original.gamma)


def test_patching_after_from_pretrained_warns_and_names_load(tmp_path):
    trained("vit").save_pretrained(tmp_path)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"use hf_stable\.load"):
        hf_stable.patch(model, "sigma_reparam")

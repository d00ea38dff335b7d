"""Loading a patched model back exactly."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import sgd_steps, tiny_config, tiny_model
from tiny_training import same_state
from trained_models import logits_of, trained

import hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.checkpoints.folding import fold_checkpoint
from hf_stable.checkpoints.saved_models import load_saved
from hf_stable.checkpoints.sidecar import read_state
from hf_stable.commands.inspect.inspection import inspect_checkpoint
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


# Another head, another config


def test_another_head_takes_what_fits_and_says_what_is_new(tmp_path):
    trained("bert").save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"left out.*: cls\.predictions\.transform\.dense; new.*pooler\.dense"
    ):
        model = hf_stable.load(transformers.BertForSequenceClassification, tmp_path, num_labels=3)
    saved, layers = read_state(tmp_path), dict(sigma_layers(model))
    shared = layers.keys() & set(saved.layers)
    assert len(shared) == len(saved.layers) - 1 and layers.keys() - shared == {"bert.pooler.dense"}
    for name in shared:
        for part, tensor in saved.layer(name).items():
            assert torch.equal(getattr(layers[name], part), tensor)
    pooler = layers["bert.pooler.dense"]
    torch.testing.assert_close(pooler.gamma, torch.linalg.matrix_norm(pooler.weight, 2)[None])
    assert hf_stable.patch(model, "sigma_reparam") is model  # all of it is patched, as it says


def test_the_class_that_was_saved_is_loaded_without_a_word(model_type, tmp_path):
    model = trained(model_type)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hf_stable.load(type(model), tmp_path)


@pytest.mark.parametrize("methods", [["sigma_reparam"], ["remove_pre_layernorm", "sigma_reparam"]])
def test_loading_info_comes_along(methods, tmp_path):
    model = hf_stable.patch(tiny_model("gpt2"), methods)
    model.save_pretrained(tmp_path)
    loaded, info = hf_stable.load(type(model), tmp_path, output_loading_info=True)
    assert same_state(loaded, model) and hf_stable.is_patched(loaded)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("auto", [False, True], ids=["class", "auto class"])
def test_a_config_of_ones_own_brings_no_norms_back(auto, tmp_path):
    model = hf_stable.patch(tiny_model("gpt2"), ["remove_pre_layernorm", "sigma_reparam"]).eval()
    model.save_pretrained(tmp_path)
    own = tiny_config("gpt2", resid_pdrop=0.5)
    model_class = transformers.AutoModelForCausalLM if auto else type(model)
    loaded = hf_stable.load(model_class, tmp_path, config=own)
    assert loaded.config.resid_pdrop == 0.5 and same_state(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))
    with pytest.raises(ValueError, match="config is a BertConfig, but .* HfStableGPT2Config"):
        hf_stable.load(model_class, tmp_path, config=tiny_config("bert"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_implementation_that_the_config_asks_for_is_not_fetched(key, tmp_path):
    model = trained("gpt2")
    model.save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: "owner/kernel"}))
    with pytest.warns(UserWarning, match="asks for 'owner/kernel', which is ignored"):
        loaded = hf_stable.load(type(model), tmp_path / "saved")
    assert same_state(loaded, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        chosen = hf_stable.load(type(model), tmp_path / "saved", attn_implementation="eager")
    assert chosen.config._attn_implementation == "eager"
    hf_stable.export(load_saved(tmp_path / "saved"), tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "saved").blocks
    assert fold_checkpoint(tmp_path / "saved", tmp_path / "plain").num_layers


# Parts that were patched one by one


def composite(**options):
    torch.manual_seed(0)
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(tiny_config("vit")),
        decoder=transformers.GPT2LMHeadModel(
            tiny_config("gpt2", add_cross_attention=True, is_decoder=True)
        ),
    )
    hf_stable.patch(model.encoder, "sigma_reparam", init="one")
    hf_stable.patch(model.decoder, "sigma_reparam", **options)
    return model


def test_parts_that_were_patched_are_patched_again(tmp_path):
    options = dict(fused_qkv="joint", power_iterations=3)
    model = composite(**options)
    model.save_pretrained(tmp_path)
    loaded = hf_stable.load(transformers.VisionEncoderDecoderModel, tmp_path)
    assert same_state(loaded, model)
    iterations = [{n: layer.power_iterations for n, layer in sigma_layers(m)}
                  for m in (model, loaded)]  # fmt: skip
    assert iterations[0] == iterations[1] and set(iterations[1].values()) == {1, 3}
    # What the script does next, as it did before the first save: nothing is left to do.
    hf_stable.patch(loaded.encoder, "sigma_reparam", init="one")
    hf_stable.patch(loaded.decoder, "sigma_reparam", **options)
    assert same_state(loaded, model)
    with pytest.raises(ValueError, match="patched already, with .*fused_qkv='joint'"):
        hf_stable.patch(loaded.decoder, "sigma_reparam")


def test_a_sidecar_that_names_no_parts_is_read(tmp_path):
    model = trained("vit")
    model.save_pretrained(tmp_path)
    path = tmp_path / SIDECAR_FILE
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["hf_stable"])
    assert description.pop("parts") == {"": description["configs"]}
    save_file(load_file(path), path, metadata={"hf_stable": json.dumps(description)})
    loaded = hf_stable.load(type(model), tmp_path)
    assert hf_stable.describe(loaded).configs == hf_stable.describe(model).configs

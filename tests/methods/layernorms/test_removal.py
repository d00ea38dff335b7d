"""Removing LayerNorms: what goes, what stays, and the exact way back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from tiny_models import METHOD, MODEL_TYPES, sgd_steps, tiny_batch, tiny_config, tiny_model
from tiny_training import make_trainer
from torch import nn

import hf_stable
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.methods.layernorms.removal import (
    RemovedNorm,
    RemoveLayerNormConfig,
    RemovePreLayerNormConfig,
    plan_removal,
    removed_norms,
)
from hf_stable.methods.patching import patch_configs
from hf_stable.monitor.log_file import read_log

IN_BLOCKS = {
    "gpt2": ["ln_1", "ln_2"] * 2,
    "vit": ["layernorm_before", "layernorm_after"] * 2,
    "swin": ["layernorm_before", "layernorm_after"] * 4,
    "bert": ["attention.output.LayerNorm", "output.LayerNorm"] * 2,
}

OUTSIDE = {
    "gpt2": {"transformer.ln_f"},
    "vit": {"vit.layernorm"},
    "swin": {"swin.embeddings.norm", "swin.encoder.layers.0.downsample.norm", "swin.layernorm"},
    "bert": {"bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"},
}


def layernorms(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is nn.LayerNorm}


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_batch(model)).logits


def test_scope_blocks_removes_the_norms_of_every_block_and_no_other(model_type):
    model = tiny_model(model_type)
    before, plain = layernorms(model), outputs(model)
    hf_stable.patch(model, METHOD[model_type])
    names = [name for name, _ in removed_norms(model)]
    for name, ending in zip(names, IN_BLOCKS[model_type], strict=True):
        assert name.endswith(ending)
    assert layernorms(model) == before - set(names) == OUTSIDE[model_type]
    assert not torch.equal(outputs(model), plain)


def test_scope_all_leaves_no_norm(model_type):
    model = tiny_model(model_type)
    before = layernorms(model)
    hf_stable.patch(model, METHOD[model_type], scope="all")
    assert {name for name, _ in removed_norms(model)} == before
    assert layernorms(model) == set()
    assert not any("norm" in name or "ln_" in name for name, _ in model.named_parameters())


def test_the_block_computes_without_the_norm():
    model = tiny_model("vit").eval()
    hf_stable.patch(model, "remove_pre_layernorm")
    block = model.vit.layers[0]
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        hidden = x + block.attention(x)[0]
        expected = hidden + block.mlp(hidden)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_cross_attention_has_its_norm_removed_too():
    model = tiny_model("gpt2", add_cross_attention=True)
    hf_stable.patch(model, "remove_pre_layernorm")
    assert "transformer.h.1.ln_cross_attn" in dict(removed_norms(model))
    assert layernorms(model) == OUTSIDE["gpt2"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["sigma-first", "removal-first"])
def test_goes_with_sigma_reparam_in_either_order(model_type, order):
    methods = ["sigma_reparam", METHOD[model_type]]
    together, apart = tiny_model(model_type), tiny_model(model_type)
    hf_stable.patch(together, [methods[i] for i in order])
    for i in order:
        hf_stable.patch(apart, methods[i])
    assert patch_configs(together) == patch_configs(apart)
    assert {config.method for config in patch_configs(together)} == set(methods)
    assert together.state_dict().keys() == apart.state_dict().keys()
    torch.testing.assert_close(outputs(together), outputs(apart), rtol=0, atol=0)
    losses = sgd_steps(together)
    assert losses == sgd_steps(apart)
    assert losses[-1] != losses[0]


def test_pre_layernorm_of_bert_is_refused_and_names_the_other_method():
    model = tiny_model("bert")
    state = model.state_dict().keys()
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM is post-LN.*remove_layernorm"):
        hf_stable.patch(model, ["sigma_reparam", "remove_pre_layernorm"])
    assert model.state_dict().keys() == state
    assert not hf_stable.is_patched(model)


@pytest.mark.parametrize("name", ["gpt2", "vit", "swin"])
def test_remove_layernorm_of_a_pre_ln_model_is_refused(name):
    with pytest.raises(UnsupportedModelError, match="pre-LN.*remove_pre_layernorm"):
        hf_stable.patch(tiny_model(name), "remove_layernorm")


def test_unknown_scope_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'blocks'.*'blocks', 'all'"):
        RemovePreLayerNormConfig(scope="block")


def test_planning_changes_nothing(model_type):
    model = tiny_model(model_type)
    before = layernorms(model)
    config_class = RemoveLayerNormConfig if model_type == "bert" else RemovePreLayerNormConfig
    plan = plan_removal(model, config_class(scope="all"))
    assert layernorms(model) == before
    plan.apply([])
    assert layernorms(model) == set()


def test_again_with_the_same_config_is_nothing_and_with_another_an_error():
    model = tiny_model("gpt2")
    hf_stable.patch(model, "remove_pre_layernorm")
    removed = removed_norms(model)
    hf_stable.patch(model, "remove_pre_layernorm")
    assert [m is n for (_, m), (_, n) in zip(removed, removed_norms(model), strict=True)]
    with pytest.raises(ValueError, match="patched already"):
        hf_stable.patch(model, "remove_pre_layernorm", scope="all")


def test_the_way_out_of_another_config_is_the_one_that_helps(tmp_path):
    model = hf_stable.patch(tiny_model("gpt2"), "remove_pre_layernorm")
    with pytest.raises(ValueError, match=r"undo that first \(hf_stable\.restore_layernorms\)"):
        hf_stable.patch(model, "remove_pre_layernorm", scope="all")
    hf_stable.patch(hf_stable.restore_layernorms(model), "remove_pre_layernorm", scope="all")
    model.save_pretrained(tmp_path)
    loaded = hf_stable.load(transformers.GPT2LMHeadModel, tmp_path)
    with pytest.raises(ValueError, match="no file has those of this one"):
        hf_stable.patch(loaded, "remove_pre_layernorm")
    sigma = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    with pytest.raises(ValueError, match=r"undo that first \(hf_stable\.fold\)"):
        hf_stable.patch(sigma, "sigma_reparam", init="one")


def test_a_class_of_a_users_own_is_refused_while_the_norms_are_there():
    class Mine(transformers.GPT2LMHeadModel):
        pass

    model = Mine(tiny_config("gpt2"))
    with pytest.raises(UnsupportedModelError, match="Mine is no model class of transformers"):
        hf_stable.patch(model, ["sigma_reparam", "remove_pre_layernorm"])
    assert layernorms(model) and not hf_stable.is_patched(model)
    hf_stable.patch(model, "sigma_reparam")


def test_a_model_that_could_not_be_saved_is_refused():
    model = tiny_model("gpt2")

    class OwnConfig(type(model.config)):
        pass

    model.config.__class__ = OwnConfig
    with pytest.raises(UnsupportedModelError, match="OwnConfig is no config of transformers"):
        hf_stable.patch(model, "remove_pre_layernorm")
    assert layernorms(model)


@pytest.mark.parametrize("scope", ["blocks", "all"])
def test_restoring_is_exact(model_type, scope):
    model = tiny_model(model_type)
    modules, state, plain = dict(model.named_modules()), model.state_dict(), outputs(model)
    hf_stable.patch(model, METHOD[model_type], scope=scope)
    assert model.state_dict().keys() < state.keys()
    assert hf_stable.restore_layernorms(model) is model
    assert all(modules[name] is module for name, module in model.named_modules())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(outputs(model), plain, rtol=0, atol=0)
    assert not hf_stable.is_patched(model)


def test_restoring_leaves_sigma_reparam_in_force():
    model = tiny_model("vit")
    hf_stable.patch(model, ["sigma_reparam", "remove_pre_layernorm"])
    hf_stable.restore_layernorms(model)
    assert [config.method for config in patch_configs(model)] == ["sigma_reparam"]
    assert not removed_norms(model)
    assert hf_stable.is_patched(model)


def test_a_model_that_was_loaded_without_norms_gets_back_what_was_removed_since(tmp_path):
    hf_stable.export(hf_stable.patch(tiny_model("gpt2"), "remove_pre_layernorm"), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="loaded without its norms"):
        hf_stable.restore_layernorms(model)
    before = outputs(model)
    hf_stable.patch(model, "remove_pre_layernorm", scope="all")
    assert [name for name, _ in removed_norms(model)] == ["transformer.ln_f"]
    assert not torch.equal(outputs(model), before)
    hf_stable.restore_layernorms(model)
    assert layernorms(model) == OUTSIDE["gpt2"] and not hf_stable.is_patched(model)
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(outputs(again), before, rtol=0, atol=0)


def test_restoring_a_plain_model_changes_nothing():
    model = tiny_model("vit")
    before = dict(model.named_modules())
    assert dict(hf_stable.restore_layernorms(model).named_modules()) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_restored_on_their_own(copied):
    model = tiny_model("gpt2")
    plain = outputs(model)
    hf_stable.patch(model, "remove_pre_layernorm")
    other = copied(model)
    torch.testing.assert_close(outputs(other), outputs(model), rtol=0, atol=0)
    hf_stable.restore_layernorms(other)
    torch.testing.assert_close(outputs(other), plain, rtol=0, atol=0)
    assert removed_norms(model)


def test_a_norm_follows_the_model_while_it_is_removed():
    model = tiny_model("vit")
    hf_stable.patch(model, "remove_pre_layernorm")
    model.to(torch.bfloat16)
    hf_stable.restore_layernorms(model)
    assert model.vit.layers[0].layernorm_before.weight.dtype == torch.bfloat16


def test_removed_norms_are_no_parameters_and_show_what_stood_there():
    model = tiny_model("vit")
    hf_stable.patch(model, "remove_pre_layernorm")
    removed = model.vit.layers[0].layernorm_before
    assert isinstance(removed, RemovedNorm) and not list(removed.parameters())
    assert not removed.state_dict()
    assert "removed LayerNorm((16,)" in str(model)


def test_fold_keeps_them_removed_and_says_so():
    model = tiny_model("vit")
    hf_stable.patch(model, ["sigma_reparam", "remove_pre_layernorm"])
    sgd_steps(model)
    before = outputs(model)
    with pytest.warns(UserWarning, match="keeps the 4 removed LayerNorms removed"):
        hf_stable.fold(model)
    assert [config.method for config in patch_configs(model)] == ["remove_pre_layernorm"]
    # Folding multiplies the weights out once, where the layer scaled them in each forward.
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-6)


def test_folding_a_model_that_was_loaded_without_norms_says_so_too(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), ["sigma_reparam", "remove_pre_layernorm"])
    model.save_pretrained(tmp_path)
    loaded = hf_stable.load(transformers.ViTForImageClassification, tmp_path)
    with pytest.warns(UserWarning, match="was loaded without.*hf_stable.export") as caught:
        hf_stable.fold(loaded)
    assert not any("restore_layernorms" in str(warning.message) for warning in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_stable.fold(hf_stable.patch(tiny_model("vit"), "sigma_reparam"))


def test_the_report_lists_layers_and_removed_norms_together(model_type):
    model = hf_stable.patch(tiny_model(model_type), METHOD[model_type])
    report = hf_stable.describe(model)
    assert report.removed_norms == tuple(name for name, _ in removed_norms(model))
    assert {row.skipped for row in report.layers} == {"sigma_reparam is not in force"}
    hf_stable.patch(model, "sigma_reparam")
    report = hf_stable.describe(model)
    assert report.num_patched > 0
    last = str(report).splitlines()[-1]
    assert last.startswith(f"{len(IN_BLOCKS[model_type])} norms removed: ")
    assert all(name in last for name in report.removed_norms)
    hf_stable.restore_layernorms(model)
    assert "norms removed" not in str(hf_stable.describe(model))


@pytest.mark.parametrize("scope", ["blocks", "all"])
def test_terms_of_removed_norms_are_absent_from_the_monitor_not_zero(model_type, scope, tmp_path):
    recorded = {}
    for kind in ("with", "without"):
        model = tiny_model(model_type)
        if kind == "without":
            hf_stable.patch(model, METHOD[model_type], scope=scope)
        monitor = hf_stable.StabilityCallback(every=1, terms="all")
        trainer = make_trainer(
            model, tmp_path / kind, callbacks=[monitor], max_steps=1, save_strategy="no"
        )
        trainer.train()
        logged = {key for record in trainer.state.log_history for key in record}
        probes = [line for line in read_log(tmp_path / kind) if line["event"] == "probe"]
        recorded[kind] = (logged, {name for line in probes for name in line["quantities"]})
    for with_norms, without in zip(*recorded.values(), strict=True):
        gone = {name for name in with_norms if "norm_gamma" in name or "norm_beta" in name}
        assert gone and with_norms - without == gone
        assert any("norm_x" in name for name in without)


def test_every_architecture_of_these_tests_has_one_of_the_methods():
    assert set(METHOD) == set(MODEL_TYPES) <= set(hf_stable.supported_architectures())


def test_blocks_of_one_class_that_differ_are_not_saved_and_the_way_out_works(tmp_path):
    model = hf_stable.patch(tiny_model("gpt2"), "remove_pre_layernorm")
    model.transformer.h[1] = tiny_model("gpt2", seed=1).transformer.h[1]
    with pytest.raises(UnsupportedModelError, match="1 of 2 GPT2Block have lost their ln_1"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    hf_stable.patch(model, "remove_pre_layernorm")
    assert len(removed_norms(model)) == 4
    model.save_pretrained(tmp_path)
    again = hf_stable.load(type(model), tmp_path)
    assert torch.equal(outputs(again), outputs(model))

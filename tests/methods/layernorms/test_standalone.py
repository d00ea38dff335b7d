"""Saving models without LayerNorms: guarded folders, and exact continuation from them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from contract_models import SAME
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from tiny_models import (
    DEFAULT_HEADS,
    METHOD,
    MODEL_TYPES,
    sgd_steps,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from tiny_training import Interrupt, dropout_model, losses, make_trainer, same_state
from transformers.models.auto import modeling_auto

import hf_stable
from hf_stable import modeling_hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.checkpoints.sidecar import read_state
from hf_stable.commands.inspect.inspection import inspect_checkpoint
from hf_stable.methods.layernorms.removal import removed_norms
from hf_stable.methods.layernorms.standalone import AUTO_CLASSES, standalone_class, standalone_form
from hf_stable.methods.patching import patch_configs


def norm_free(model_type: str, *also: str, head: str | None = None, scope: str = "blocks"):
    """A trained model without LayerNorms, in evaluation mode."""
    model = tiny_model(model_type, head)
    hf_stable.patch(model, METHOD[model_type], scope=scope)
    if also:
        hf_stable.patch(model, also)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_batch(model)).logits


def native_class(model):
    return getattr(transformers, DEFAULT_HEADS[model.config.model_type])


def auto_class(model_type):
    """The auto class that loads the default head."""
    return {
        "gpt2": transformers.AutoModelForCausalLM,
        "bert": transformers.AutoModelForMaskedLM,
        "vit": transformers.AutoModelForImageClassification,
        "swin": transformers.AutoModelForImageClassification,
    }[model_type]


@pytest.fixture(params=[(), ("sigma_reparam",)], ids=["plain", "sigma"])
def also(request):
    return request.param


def test_save_pretrained_writes_the_guarded_form_and_the_sidecar(model_type, also, tmp_path):
    model = norm_free(model_type, *also)
    config = model.config
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"hf_stable_{model_type}"
    assert saved["architectures"] == [f"HfStable{DEFAULT_HEADS[model_type]}"]
    assert (tmp_path / "modeling_hf_stable.py").read_text() == open(
        modeling_hf_stable.__file__
    ).read()
    assert read_state(tmp_path).configs == patch_configs(model)
    assert model.config is config and type(config) is type(tiny_config(model_type))


@pytest.mark.parametrize("resaved", [False, True], ids=["saved", "saved-again"])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["", "ignoring"])
def test_the_native_class_refuses_the_folder(model_type, resaved, options, tmp_path):
    model = norm_free(model_type)
    model.save_pretrained(tmp_path)
    if resaved:
        standalone_class(native_class(model)).from_pretrained(tmp_path).save_pretrained(tmp_path)
    for cls in (native_class(model), type(model.config)):
        with pytest.raises(StrictDataclassFieldValidationError, match="LayerNorms of this model"):
            cls.from_pretrained(tmp_path, **options)


def test_without_its_guards_the_native_class_would_load_it(model_type, tmp_path):
    model = norm_free(model_type)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved[modeling_hf_stable.guarded_field(type(model.config))] = saved["layer_norm_number"]
    path.write_text(json.dumps(saved))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # the weights refuse too
        native_class(model).from_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (guard,) = modeling_hf_stable.weight_guard(model, saved["removed_layernorms"])
    assert weights.pop(guard).shape == (1,)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wrong = native_class(model).from_pretrained(tmp_path)
    assert not torch.allclose(logits(wrong), logits(model), atol=1e-3)


def test_auto_classes_load_it_here_without_remote_code(model_type, also, tmp_path):
    model = norm_free(model_type, *also)
    model.save_pretrained(tmp_path)
    for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        loaded = auto_class(model_type).from_pretrained(tmp_path, **options)
        assert type(loaded) is standalone_class(type(model))
        # Where sigma layers were folded, the product is rounded at another place.
        tolerance = SAME if also else dict(rtol=0, atol=0)
        torch.testing.assert_close(logits(loaded), logits(model), **tolerance)


def test_a_loaded_model_is_patched_trained_and_saved_again(model_type, tmp_path):
    hf_stable.export(norm_free(model_type), tmp_path / "first")
    cls = standalone_class(getattr(transformers, DEFAULT_HEADS[model_type]))
    model = hf_stable.patch(cls.from_pretrained(tmp_path / "first").train(), "sigma_reparam")
    hf_stable.patch(model, METHOD[model_type])
    assert not removed_norms(model)
    sgd_steps(model)
    model.save_pretrained(tmp_path / "second")
    torch.testing.assert_close(
        logits(cls.from_pretrained(tmp_path / "second")), logits(model), **SAME
    )
    assert read_state(tmp_path / "second").configs == patch_configs(model)
    with pytest.raises(UnsupportedModelError, match="loaded without its norms"):
        hf_stable.restore_layernorms(model)


def test_a_second_removal_joins_the_first(tmp_path):
    hf_stable.export(norm_free("gpt2"), tmp_path / "first")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    hf_stable.patch(model, "remove_pre_layernorm", scope="all")
    model.save_pretrained(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "config.json").read_text())
    assert saved["removed_layernorms"] == {"GPT2Block": ["ln_1", "ln_2"], "GPT2Model": ["ln_f"]}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_the_epsilon_of_the_norms_that_stay_survives(tmp_path):
    model = tiny_model("gpt2", layer_norm_epsilon=0.5)
    hf_stable.patch(model, "remove_pre_layernorm")
    model.save_pretrained(tmp_path / "first")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert again.transformer.ln_f.eps == again.config.layer_norm_epsilon == 0.5
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_a_new_head_goes_on_a_body_without_norms(tmp_path):
    norm_free("bert").save_pretrained(tmp_path)
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    assert type(model).__name__ == "HfStableBertForTokenClassification"
    assert not any("encoder" in n and "LayerNorm" in n for n, _ in model.named_parameters())
    assert model.classifier.out_features == 5


def test_a_patched_model_inside_another_cannot_be_saved_silently_wrong(tmp_path):
    encoder = norm_free("vit", head="ViTModel")
    decoder = tiny_model("gpt2", add_cross_attention=True, is_decoder=True)
    model = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    with pytest.raises(UnsupportedModelError, match="without norms could not be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_config_comes_back_after_a_failed_save():
    model = norm_free("vit")
    config = model.config
    with pytest.raises(RuntimeError, match="disk"), standalone_form(model):
        assert model.config is not config
        raise RuntimeError("disk")
    assert model.config is config


def test_a_config_copied_through_its_dict_is_equal():
    config = modeling_hf_stable.HfStableViTConfig(
        removed_layernorms={"ViTLayer": ["layernorm_before"]}, layer_norm_eps=0.25
    )
    copied = type(config)(**config.to_dict())
    assert copied.layer_norm_eps == 0.25
    assert copied.removed_layernorms == config.removed_layernorms
    assert copied.to_dict() == config.to_dict()


def test_the_table_of_auto_classes_is_complete():
    known = set()
    for cls in vars(modeling_auto).values():
        mapping = getattr(cls, "_model_mapping", None) if isinstance(cls, type) else None
        if mapping is not None and cls.__name__ in dir(transformers):
            known.add(cls.__name__)
            assert getattr(transformers, AUTO_CLASSES[cls.__name__]) is mapping
    assert known == set(AUTO_CLASSES)


# Continuing


def test_load_continues_it_with_the_native_and_the_auto_class(model_type, also, tmp_path):
    model = norm_free(model_type, *also)
    model.save_pretrained(tmp_path)
    for cls in (native_class(model), auto_class(model_type)):
        loaded = hf_stable.load(cls, tmp_path)
        assert patch_configs(loaded) == patch_configs(model)
        assert same_state(loaded, model)
        # The loaded weights lie elsewhere in memory, which may round a product differently.
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
        after = sgd_steps(copy.deepcopy(model).train())
        assert sgd_steps(loaded.train()) == pytest.approx(after, rel=1e-6)
        assert after[0] != after[-1]
        loaded.save_pretrained(tmp_path / "again")
        assert same_state(hf_stable.load(cls, tmp_path / "again"), loaded)


def patched_dropout_model(model_type, *also):
    return hf_stable.patch(dropout_model(model_type), [METHOD[model_type], *also])


@pytest.mark.parametrize(
    ("model_type", "also"),
    [("gpt2", ()), *((model_type, ("sigma_reparam",)) for model_type in MODEL_TYPES)],
    ids=["gpt2-plain", *(f"{model_type}-sigma" for model_type in MODEL_TYPES)],
)
def test_the_trainer_resumes_it_exactly(model_type, also, tmp_path):
    settings = dict(max_steps=4, save_steps=2)
    whole = make_trainer(patched_dropout_model(model_type, *also), tmp_path / "whole", **settings)
    whole.train()
    model = patched_dropout_model(model_type, *also)
    make_trainer(model, tmp_path / "cut", callbacks=[Interrupt(2)], **settings).train()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert (checkpoint / "modeling_hf_stable.py").is_file() and (
        checkpoint / SIDECAR_FILE
    ).is_file()
    with pytest.raises(StrictDataclassFieldValidationError):
        native_class(model).from_pretrained(checkpoint)
    resumed = make_trainer(patched_dropout_model(model_type, *also), tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    assert same_state(resumed.model, whole.model)
    assert not same_state(whole.model, patched_dropout_model(model_type, *also))


def test_the_trainer_continues_a_model_from_load(tmp_path):
    trainer = make_trainer(patched_dropout_model("gpt2", "sigma_reparam"), tmp_path, max_steps=3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    model = hf_stable.load(transformers.GPT2LMHeadModel, checkpoint).train()
    again = make_trainer(model, tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again)[3] == pytest.approx(losses(trainer)[3], rel=1e-6)
    assert again.state.global_step == 3


def test_load_best_model_at_end_takes_the_best_one_whole(also, tmp_path):
    model = patched_dropout_model("vit", *also)
    trainer = make_trainer(
        model,
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        # The highest loss, so that the best checkpoint is not the last.
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-4")
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert same_state(hf_stable.load(transformers.ViTForImageClassification, best), model)


def test_resuming_with_norms_is_refused(tmp_path):
    trainer = make_trainer(patched_dropout_model("vit"), tmp_path, max_steps=1)
    trainer.train()
    plain = make_trainer(dropout_model("vit"), tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="a patched model was saved here.*is plain"):
        plain.train(resume_from_checkpoint=True)
    sigma = hf_stable.patch(dropout_model("vit"), "sigma_reparam")
    with pytest.raises(ValueError, match="written for another config.*RemovePreLayerNorm"):
        make_trainer(sigma, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_adamw2_trains_it(model_type, tmp_path):
    model = patched_dropout_model(model_type, "sigma_reparam")
    trainer = make_trainer(model, tmp_path, optim="adamw2", max_steps=2, save_strategy="no")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters()}


def test_a_config_of_another_class_brings_no_norms_back_either(tmp_path):
    """The sentence in config.json is not read then; the weights refuse."""
    model = hf_stable.patch(tiny_model("gpt2"), "remove_pre_layernorm").eval()
    model.save_pretrained(tmp_path / "first")
    standalone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    standalone.save_pretrained(tmp_path / "again")
    for folder in ("first", "again"):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            type(model).from_pretrained(tmp_path / folder, config=tiny_config("gpt2"))
        both = dict(config=tiny_config("gpt2"), ignore_mismatched_sizes=True)
        for cls in (type(model), transformers.GPT2Model, transformers.AutoModelForCausalLM):
            with pytest.raises(ValueError, match="LayerNorms of the model in it were removed"):
                cls.from_pretrained(tmp_path / folder, **both)
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        assert not any(info.values())
        batch = tiny_batch(model)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)
    measured = [norm.name for norm in inspect_checkpoint(tmp_path / "again").norms]
    assert measured == ["transformer.ln_f"]

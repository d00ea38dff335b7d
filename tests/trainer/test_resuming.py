"""Resuming where the model or the Trainer is not transformers' own, and from the wrong folder."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from contract_models import SAME
from held_models import Classifier, held_model, held_trainer, texts
from safetensors.torch import load_file, save_file
from tiny_training import Interrupt, dropout_model, losses, make_trainer, same_state
from transformers import Trainer

import hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.methods.sigma_reparam.method import sigma_layers


def patched(model_type: str = "vit", **options):
    return hf_stable.patch(dropout_model(model_type), "sigma_reparam", init="one", **options)


class OwnWay(Trainer):
    """Loads a checkpoint as a plain model and copies its weights, as some libraries do."""

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        loaded = transformers.AutoModelForImageClassification.from_pretrained(checkpoint_path)
        self.model.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def own_way(model, folder, **options) -> OwnWay:
    trainer = make_trainer(model, folder, optim="adamw2", **options)
    trainer.__class__ = OwnWay
    return trainer


@pytest.fixture
def interrupted(tmp_path):
    """A run that OwnWay has trained to the end, and one that stopped half way."""
    whole = own_way(patched(), tmp_path / "whole")
    whole.train()
    own_way(patched(), tmp_path / "cut", callbacks=[Interrupt(3)]).train()
    return whole, tmp_path / "cut"


def test_a_trainer_that_loads_its_own_way_resumes_exactly(interrupted):
    whole, folder = interrupted
    resumed = own_way(patched(), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed.train(resume_from_checkpoint=True)
    assert {step: losses(whole)[step] for step in (4, 5, 6)}.items() <= losses(resumed).items()
    assert same_state(resumed.model, whole.model)
    assert "_load_from_checkpoint" not in vars(resumed)


def test_without_a_sidecar_it_goes_on_from_plain_weights_and_says_so(interrupted):
    whole, folder = interrupted
    (folder / "checkpoint-3" / SIDECAR_FILE).unlink()
    resumed = own_way(patched(), folder)
    with pytest.warns(UserWarning, match=r"patched layers .* go on from the folded weights"):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert sigma_layers(resumed.model) and not same_state(resumed.model, whole.model)
    assert losses(resumed)[4][0] == pytest.approx(losses(whole)[4][0], rel=1e-5)


def test_the_sidecar_of_a_subfolder_is_found_by_what_it_folds_to(interrupted):
    whole, folder = interrupted
    checkpoint = folder / "checkpoint-3"
    (checkpoint / "0_Transformer").mkdir()
    (checkpoint / SIDECAR_FILE).rename(checkpoint / "0_Transformer" / SIDECAR_FILE)
    resumed = own_way(patched(), folder)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same_state(resumed.model, whole.model)


def test_the_best_model_of_its_own_way_is_the_one_that_was_measured(tmp_path):
    trainer = own_way(
        patched(), tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        learning_rate=0.1, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    best, last = trainer.state.best_model_checkpoint, tmp_path / "checkpoint-6"
    assert best != str(last)
    assert same_state(trainer.model, hf_stable.load(type(trainer.model), best))
    assert not same_state(trainer.model, hf_stable.load(type(trainer.model), last))


# A module that holds a patched model


def test_checkpoints_of_a_module_that_holds_a_patched_model_are_plain(tmp_path):
    model = held_model("sigma_reparam", init="one")
    held_trainer(model, tmp_path).train()
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == Classifier().state_dict().keys()
    plain = Classifier()
    plain.load_state_dict(saved)
    batch = torch.stack([each["input_ids"] for each in texts(8)])
    with torch.no_grad():
        expected, found = model.eval()(batch)["logits"], plain.eval()(batch)["logits"]
    torch.testing.assert_close(found, expected, **SAME)
    raw = model.state_dict()["bert.encoder.layer.0.output.dense.weight"]
    assert not torch.allclose(raw, saved["bert.encoder.layer.0.output.dense.weight"], rtol=0.01)


@pytest.mark.parametrize("methods", [["sigma_reparam"], ["remove_layernorm", "sigma_reparam"]])
def test_it_resumes_exactly(methods, tmp_path):
    whole = held_trainer(held_model(*methods), tmp_path / "whole")
    whole.train()
    cut = tmp_path / "cut"
    held_trainer(held_model(*methods), cut, callbacks=[Interrupt(2)]).train()
    resumed = held_trainer(held_model(*methods, seed=5), cut)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[4] == losses(whole)[4]
    assert same_state(resumed.model, whole.model)
    assert not same_state(resumed.model, held_model(*methods))


def test_a_checkpoint_with_raw_weights_and_no_sidecar_continues_it(tmp_path):
    """accelerate, and versions before this one, save the state dict of such a module as it is."""
    whole = held_trainer(held_model("sigma_reparam"), tmp_path / "whole")
    whole.train()
    cut = held_trainer(held_model("sigma_reparam"), tmp_path / "cut", callbacks=[Interrupt(2)])
    cut.train()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    (checkpoint / SIDECAR_FILE).unlink()
    save_file(cut.model.state_dict(), checkpoint / "model.safetensors", {"format": "pt"})
    resumed = held_trainer(held_model("sigma_reparam", seed=5), tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same_state(resumed.model, whole.model)


def test_a_plain_one_is_saved_as_ever_and_leaves_no_sidecar(tmp_path):
    held_trainer(held_model("sigma_reparam"), tmp_path, max_steps=1).train()
    assert (tmp_path / "checkpoint-1" / SIDECAR_FILE).is_file()
    model = held_model()
    held_trainer(model, tmp_path, max_steps=1).train()
    assert not (tmp_path / "checkpoint-1" / SIDECAR_FILE).exists()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


class Interruption(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupt_comes_through_and_leaves_a_record(tmp_path):
    model = held_model("sigma_reparam")
    trainer = held_trainer(model, tmp_path, callbacks=[Interruption()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert model.hf_stable_training["settings"]["precision"] == "float32"


def test_its_card_is_written_and_says_how_to_load_it(tmp_path):
    model = held_model("sigma_reparam")
    trainer = held_trainer(model, tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert f"{len(sigma_layers(model))} layers were trained with sigmaReparam" in card
    assert "model = Classifier(...)" in card and 'load_file("model.safetensors")' in card
    assert not hasattr(model, "config")


# Compiled before the Trainer


def compiled_trainer(model, folder, **options):
    # Which columns it takes cannot be read off a compiled model, with or without hf_stable.
    return make_trainer(model, folder, remove_unused_columns=False, **options)


@pytest.mark.slow
def test_a_model_that_was_compiled_by_hand_is_saved_plain_and_resumes_exactly(tmp_path):
    whole = compiled_trainer(torch.compile(patched("gpt2"), backend="eager"), tmp_path / "whole")
    whole.train()
    saved = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    assert not any("_orig_mod" in name or name.endswith("gamma") for name in saved)
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    batch = {"input_ids": torch.arange(12)[None]}
    with torch.no_grad():
        expected = whole.model.eval()(**batch).logits
        torch.testing.assert_close(plain.eval()(**batch).logits, expected, **SAME)
    cut = tmp_path / "cut"
    compiled = torch.compile(patched("gpt2"), backend="eager")
    compiled_trainer(compiled, cut, callbacks=[Interrupt(3)]).train()
    resumed = compiled_trainer(torch.compile(patched("gpt2"), backend="eager"), cut)
    resumed.train(resume_from_checkpoint=True)
    assert same_state(resumed.model, whole.model)
    # Compiled or not is no matter of the files: a model that is not compiled takes them as well.
    uncompiled = make_trainer(patched("gpt2"), tmp_path / "whole")
    uncompiled.train(resume_from_checkpoint=True)  # nothing is left to train
    assert same_state(uncompiled.model, whole.model._orig_mod)


# The wrong folder


def test_a_folder_that_is_not_there_is_said_to_be_so(tmp_path):
    make_trainer(patched(), tmp_path, max_steps=2).train()
    trainer = make_trainer(patched(), tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint '.*chekpoint-2' \(did you mean 'checkpoint-2'\?\)"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "chekpoint-2"))


def test_the_folder_of_the_run_is_no_checkpoint(tmp_path):
    make_trainer(patched(), tmp_path, max_steps=1).train()
    trainer = make_trainer(patched(), tmp_path)
    with pytest.raises(ValueError, match="no safetensors weights; its subfolders do: checkpoint-1"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def test_the_checkpoint_of_a_plain_run_is_said_to_be_one(tmp_path):
    make_trainer(dropout_model("vit"), tmp_path, max_steps=1).train()
    trainer = make_trainer(patched(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"saved by a model that is not patched.*leave the"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

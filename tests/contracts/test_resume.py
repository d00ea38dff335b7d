"""The Trainer's resume and best-model selection: bit for bit, or a clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from gloo_ranks import run_processes
from safetensors.torch import load_file, save_file
from tiny_models import tiny_batch, tiny_model
from tiny_training import Interrupt, dropout_model, losses, make_trainer, same_state
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer

import hf_stable.checkpoints.sidecar
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.checkpoints.completeness import is_complete

PATCHED = {"plain": False, "patched": True}


def build(model_type: str, patched: bool):
    model = dropout_model(model_type)
    return hf_stable.patch(model, "sigma_reparam") if patched else model


def run(folder, model_type="vit", patched=True, *, resume=None, stop=None, **options):
    trainer = make_trainer(
        build(model_type, patched),
        folder,
        callbacks=[] if stop is None else [Interrupt(stop)],
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("patched", "optim"),
    [
        pytest.param(True, "adamw2", id="patched-adamw2"),
        pytest.param(True, "adamw_torch_fused", id="patched-adamw"),
        pytest.param(False, "adamw2", id="plain-adamw2"),
        pytest.param(False, "adamw_torch_fused", id="plain-adamw", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(model_type, patched, optim, tmp_path):
    whole = run(tmp_path / "whole", model_type, patched, optim=optim, save_strategy="no")
    first = run(tmp_path / "parts", model_type, patched, optim=optim, stop=3, save_steps=3)
    assert first.state.global_step == 3
    second = run(tmp_path / "parts", model_type, patched, optim=optim, resume=True, save_steps=3)
    assert losses(second) == losses(whole)
    assert len(losses(whole)) == 6
    assert same_state(second.model, whole.model)
    assert not same_state(first.model, whole.model)


@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_accumulation_steps=2, lr_scheduler_type="cosine"),
        dict(bf16=True, max_grad_norm=0.1),
        dict(lr_scheduler_type="cosine_with_restarts", weight_decay=0.1),
    ],
    ids=["accumulation", "bf16 and clipping", "restarts"],
)
def test_any_step_can_be_the_last(options, tmp_path):
    whole = run(tmp_path, "gpt2", optim="adamw2", **options)
    for step in (1, 5):  # step 5 ends an epoch
        resumed = run(
            tmp_path / "resumed", "gpt2", resume=str(tmp_path / f"checkpoint-{step}"),
            optim="adamw2", save_strategy="no", **options,
        )  # fmt: skip
        assert losses(resumed) == losses(whole)
        assert same_state(resumed.model, whole.model)


@pytest.mark.parametrize("patched", PATCHED.values(), ids=PATCHED)
def test_sharded_checkpoint_resumes_exactly(patched, tmp_path):
    whole = run(tmp_path, "vit", patched, save_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    partial = run(tmp_path / "partial", "vit", patched, stop=3, save_strategy="no")
    (checkpoint / "model.safetensors").unlink()
    partial.model.save_pretrained(checkpoint, max_shard_size="10KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    resumed = run(tmp_path / "resumed", "vit", patched, resume=str(checkpoint), save_strategy="no")
    assert same_state(resumed.model, whole.model)


@pytest.mark.parametrize("patched", PATCHED.values(), ids=PATCHED)
def test_best_model_is_the_one_that_was_measured(model_type, patched, tmp_path):
    trainer = run(
        tmp_path, model_type, patched, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst model, so that the best is not the last
    )  # fmt: skip
    assert trainer.state.best_global_step < 6
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    last = [r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r][-2]
    assert last != trainer.state.best_metric


def test_without_the_plugin_a_plain_vit_starts_layers_anew(tmp_path, monkeypatch):
    whole = run(tmp_path, "vit", patched=False)
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", Trainer._load_from_checkpoint.__wrapped__)
    resumed = run(
        tmp_path / "resumed", "vit", patched=False, resume=str(tmp_path / "checkpoint-3"),
        save_strategy="no",
    )  # fmt: skip
    assert not same_state(resumed.model, whole.model)


def test_model_that_was_loaded_from_a_folder_resumes_exactly(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path / "pretrained")

    def start(folder, **options):
        model = type(tiny_model("vit")).from_pretrained(tmp_path / "pretrained")
        return make_trainer(hf_stable.patch(model.train(), "sigma_reparam"), folder, **options)

    whole = start(tmp_path / "run")
    whole.train()
    resumed = start(tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same_state(resumed.model, whole.model)


def test_model_that_was_loaded_patched_resumes_exactly(model_type, tmp_path):
    whole = run(tmp_path / "run", model_type)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    model = hf_stable.load(type(whole.model), checkpoint).train()
    resumed = make_trainer(model, tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    assert same_state(resumed.model, whole.model)
    assert not same_state(resumed.model, hf_stable.load(type(whole.model), checkpoint))


def test_checkpoint_loads_by_name(tmp_path):
    trainer = run(tmp_path)
    loaded = hf_stable.load(type(trainer.model), tmp_path / "checkpoint-6")
    assert same_state(loaded, trainer.model)


def test_creating_optimizer_state_moves_no_sigma():
    """torch.distributed.checkpoint makes a step of rate zero before it loads a state."""
    model = build("vit", patched=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    saved = get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert len(optimizer.state) > 0  # it did step
    set_optimizer_state_dict(model, torch.optim.AdamW(model.parameters(), lr=0.1), saved)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model(**tiny_batch(model)).loss.backward()
    optimizer.step()
    sigmas = [key for key in before if key.endswith("sigma")]
    assert not any(torch.equal(before[key], model.state_dict()[key]) for key in sigmas)


# What cannot be continued


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    run(tmp_path, max_steps=2, save_steps=2)
    return tmp_path / "checkpoint-2"


def resume(checkpoint, model=None):
    trainer = make_trainer(model or build("vit", True), checkpoint.parent, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def test_missing_sidecar(checkpoint):
    (checkpoint / SIDECAR_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{SIDECAR_FILE} is missing.*hf_stable\.patch"):
        resume(checkpoint)


def test_damaged_sidecar(checkpoint):
    path = checkpoint / SIDECAR_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{SIDECAR_FILE} is damaged"):
        resume(checkpoint)


def test_sidecar_of_another_config(checkpoint):
    model = hf_stable.patch(dropout_model("vit"), "sigma_reparam", init="one")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"another config.*init='spectral'.*init='one'"):
        resume(checkpoint, model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_sidecar_of_another_save(checkpoint, tmp_path):
    run(tmp_path / "other", max_steps=1)
    shutil.copy(tmp_path / "other" / "checkpoint-1" / SIDECAR_FILE, checkpoint)
    with pytest.raises(ValueError, match="belongs to another save"):
        resume(checkpoint)


def test_plain_model_on_a_patched_checkpoint(checkpoint):
    with pytest.raises(ValueError, match=r"this ViTForImageClassification is plain.*patch"):
        resume(checkpoint, build("vit", False))


def test_weights_that_do_not_fill_a_patched_model(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*'classifier\.bias'"):
        resume(checkpoint)


def test_truncated_weights(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"weights file in .*checkpoint-2 is truncated"):
        resume(checkpoint)


def fill_with_zeros(path, start=0, length=None):
    """Overwrite a file as a file system does that lost what it had not written yet."""
    content = bytearray(path.read_bytes())
    end = len(content) if length is None else start + length
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "trainer_state.json").unlink(),
        lambda folder: (folder / "trainer_state.json").write_text('{"epoch": 1.0, "glo'),
        lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"),
        lambda folder: (folder / SIDECAR_FILE).write_bytes(b"12345678"),
        lambda folder: (folder / SIDECAR_FILE).unlink(),
        lambda folder: (folder / "optimizer.pt").unlink(),
        lambda folder: (folder / "scheduler.pt").unlink(),
        lambda folder: (folder / "rng_state.pth").unlink(),
        lambda folder: (folder / "optimizer.pt").write_bytes(b""),
        lambda folder: fill_with_zeros(folder / "optimizer.pt"),
        lambda folder: fill_with_zeros(folder / "rng_state.pth"),
        lambda folder: fill_with_zeros(folder / "scheduler.pt", start=400, length=100),
    ],
    ids=[
        "no state",
        "half a state",
        "half weights",
        "half a sidecar",
        "no sidecar",
        "no optimizer",
        "no scheduler",
        "no random state",
        "an empty optimizer",
        "an optimizer of zeros",
        "a random state of zeros",
        "zeros in the scheduler",
    ],
)
def test_incomplete_checkpoint_is_not_picked(damage, tmp_path):
    whole = run(tmp_path)
    for step in (5, 6):
        damage(tmp_path / f"checkpoint-{step}")
    with pytest.warns(UserWarning, match="checkpoint-6 was not saved.*from .*checkpoint-4 instead"):
        resumed = run(tmp_path, resume=True)
    assert losses(resumed) == losses(whole)
    assert same_state(resumed.model, whole.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(tmp_path, resume=True)  # all complete again


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_file_of_the_checkpoint_that_is_asked_for_is_named(name, tmp_path):
    run(tmp_path, max_steps=2)
    fill_with_zeros(tmp_path / "checkpoint-2" / name)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*checkpoint-1 is complete"):
        resume(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
def test_what_the_checkpoint_that_is_asked_for_lacks_is_said(name, patched, tmp_path):
    run(tmp_path, max_steps=1, patched=patched)
    (tmp_path / "checkpoint-1" / name).unlink()
    with pytest.warns(UserWarning, match=rf"has no {name}.*this is not the run that was"):
        resume(tmp_path / "checkpoint-1", build("vit", patched))


def test_a_run_that_saves_models_only_expects_no_more(tmp_path):
    run(tmp_path, max_steps=2, save_only_model=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(tmp_path, max_steps=2, save_only_model=True, resume=True)


def test_no_complete_checkpoint(tmp_path):
    run(tmp_path, max_steps=1)
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()
    with (
        pytest.warns(UserWarning, match="resuming from nothing instead"),
        pytest.raises(ValueError, match="No valid checkpoint"),
    ):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("patched", PATCHED.values(), ids=PATCHED)
def test_checkpoint_that_is_saved_again_is_not_picked_until_it_is_whole(patched, tmp_path):
    run(tmp_path, patched=patched, max_steps=2)
    again = tmp_path / "checkpoint-2"
    assert is_complete(again)
    (again / "optimizer.pt").unlink()
    (again / "optimizer.pt").mkdir()  # so that saving fails after the weights are written
    first, options = str(tmp_path / "checkpoint-1"), dict(patched=patched, learning_rate=1e-3)
    with pytest.raises(RuntimeError, match=r"optimizer\.pt|directory"):
        run(tmp_path, resume=first, **options)
    (again / "optimizer.pt").rmdir()
    with pytest.warns(UserWarning, match="checkpoint-2 was not saved.*checkpoint-1 instead"):
        resumed = run(tmp_path, resume=True, **options)
    assert is_complete(again)
    expected = run(tmp_path / "other", resume=first, save_strategy="no", **options)
    assert same_state(resumed.model, expected.model)


def run_and_die(folder, point, again):
    """Train until a file of the second checkpoint is half written, and be killed there."""

    def die(path):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function, position):
        def write(*args, **kwargs):
            die(args[position])
            return function(*args, **kwargs)

        return write

    def save(obj, path, *rest):
        if str(path).endswith("optimizer.pt"):
            die(path)
        torch_save(obj, path, *rest)

    torch_save = torch.save
    if point == "optimizer":
        torch.save = save
    else:
        target, function, position = {
            "weights": (transformers.modeling_utils, "safe_save_file", 1),
            "sidecar": (hf_stable.checkpoints.sidecar, "save_file", 1),
            "trainer state": (transformers.TrainerState, "save_to_json", 1),
        }[point]
        setattr(target, function, dying(getattr(target, function), position))
    run(folder, save_steps=2, optim="adamw2", resume=again)


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True], ids=["new folder", "existing folder"])
@pytest.mark.parametrize("point", ["weights", "sidecar", "optimizer", "trainer state"])
def test_killed_while_saving(point, existing, tmp_path):
    again = None
    if existing:
        run(tmp_path / "run", save_steps=2, optim="adamw2")
        shutil.rmtree(tmp_path / "run" / "checkpoint-6")
        again = str(tmp_path / "run" / "checkpoint-2")
    ((code, printed),) = run_processes([(run_and_die, (tmp_path / "run", point, again))], tmp_path)
    assert code == -signal.SIGKILL, printed[-2000:]
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    with pytest.warns(UserWarning, match="checkpoint-4 was not saved.*checkpoint-2 instead"):
        resumed = run(tmp_path / "run", resume=True, save_steps=2, optim="adamw2")
    whole = run(tmp_path / "whole", save_strategy="no", optim="adamw2")
    assert losses(resumed) == losses(whole)
    assert same_state(resumed.model, whole.model)
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4

"""Folders that cannot be written or continued: an error that names the file and the way out."""

from __future__ import annotations

import inspect
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import sgd_steps, tiny_model
from transformers import PreTrainedModel

import hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.methods.sigma_reparam.method import sigma_layers


@pytest.fixture
def folder(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    sgd_steps(model)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def model_class():
    return type(tiny_model("vit"))


def load(folder):
    return hf_stable.load(model_class(), folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(path, change):
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["hf_stable"])
    change(description)
    save_file(load_file(path), path, metadata={"hf_stable": json.dumps(description)})


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_last_bit, lambda path: path.write_bytes(b""), lambda p: save_file({}, p)],
    ids=["truncated", "bit flipped", "empty", "another file"],
)
def test_damaged_sidecar(folder, damage):
    load(folder)
    damage(folder / SIDECAR_FILE)
    with pytest.raises(ValueError, match=rf"{SIDECAR_FILE} is damaged .*hf_stable\.patch"):
        load(folder)


def test_missing_shard_of_the_sidecar(tmp_path):
    model = hf_stable.patch(tiny_model("swin"), "sigma_reparam")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("hf_stable_state-*"))[0].unlink()
    with pytest.raises(ValueError, match=rf"{SIDECAR_FILE} is damaged .*00001-of"):
        hf_stable.load(type(model), tmp_path)


def test_sidecar_of_another_save(folder, tmp_path):
    other = load(folder).train()
    sgd_steps(other, steps=1, lr=1e-4)
    other.save_pretrained(tmp_path / "later")
    load(tmp_path / "later")
    shutil.copy(tmp_path / "later" / SIDECAR_FILE, folder)
    with pytest.raises(ValueError, match="belongs to another save than the weights beside it"):
        load(folder)


def test_another_number_of_labels(tmp_path):
    hf_stable.patch(tiny_model("vit"), "sigma_reparam", heads="include").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        hf_stable.load(model_class(), tmp_path, num_labels=7)
    with pytest.warns(UserWarning, match="left out.*: classifier; new, .*: classifier"):
        model = hf_stable.load(model_class(), tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    classifier = dict(sigma_layers(model))["classifier"]
    assert classifier.weight.shape == (7, 16)
    torch.testing.assert_close(
        classifier.sigma, torch.linalg.matrix_norm(classifier.weight, 2)[None]
    )


def test_sidecar_of_a_later_format(folder):
    rewrite(folder / SIDECAR_FILE, lambda description: description.update(format_version=99))
    with pytest.raises(ValueError, match="has format 99.*Upgrade hf_stable"):
        load(folder)


def test_truncated_weights(folder):
    truncate(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights file in .*saved is truncated or damaged"):
        load(folder)


def test_model_without_the_saved_layers(folder):
    with pytest.raises(hf_stable.UnsupportedModelError, match="config.json names"):
        hf_stable.load(_WithoutBlocks, folder)


class _WithoutBlocks:
    @staticmethod
    def from_pretrained(path):
        return torch.nn.Linear(2, 2)


@pytest.mark.parametrize("below", [False, True], ids=["a file", "below a file"])
def test_directory_that_cannot_be_written(tmp_path, below):
    (tmp_path / "file").write_text("something")
    target = tmp_path / "file" / "model" if below else tmp_path / "file"
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    with pytest.raises(OSError, match=r"cannot save the model to .*choose a directory"):
        model.save_pretrained(target)
    assert (tmp_path / "file").read_text() == "something"
    assert sigma_layers(model)


def test_sidecar_that_cannot_be_written(folder):
    model = load(folder)
    (folder / SIDECAR_FILE).unlink()
    (folder / SIDECAR_FILE).mkdir()
    with pytest.raises(OSError, match=f"{SIDECAR_FILE} could not be written"):
        model.save_pretrained(folder)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.skipif(
    "distributed_checkpoint" not in inspect.signature(PreTrainedModel.save_pretrained).parameters,
    reason="this transformers has no distributed checkpoints",
)
def test_distributed_checkpoint_is_refused(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    with pytest.raises(ValueError, match="distributed_checkpoint=True"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)

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
from hf_stable.checkpoints import sidecar
from hf_stable.commands.conventions import BAD_INPUT
from hf_stable.commands.main import main
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


def without_gamma(tensors):
    del tensors[next(key for key in tensors if key.endswith(".gamma"))]


def with_short_u(tensors):
    key = next(key for key in tensors if key.endswith(".sigma_u"))
    tensors[key] = tensors[key][:, :-1].contiguous()


def with_long_gamma(tensors):
    key = next(key for key in tensors if key.endswith(".gamma"))
    tensors[key] = tensors[key].repeat(2)


def with_integers(tensors):
    key = next(key for key in tensors if key.endswith(".sigma"))
    tensors[key] = tensors[key].int()


def with_sigma_nan(tensors):
    key = next(key for key in tensors if key.endswith(".sigma"))
    tensors[key] = torch.full_like(tensors[key], torch.nan)


def with_a_stranger(tensors):
    tensors["other"] = torch.zeros(3)


@pytest.mark.parametrize(
    "change",
    [
        without_gamma,
        with_short_u,
        with_long_gamma,
        with_integers,
        with_a_stranger,
        with_sigma_nan,
    ],
)
def test_tensors_that_do_not_fit_together_whatever_the_checksum_says(change, folder, capsys):
    path = folder / SIDECAR_FILE
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["hf_stable"])
    change(tensors)
    description["checksum"] = sidecar.checksum(tensors)
    save_file(tensors, path, metadata={"hf_stable": json.dumps(description)})
    with pytest.raises(ValueError, match=rf"{SIDECAR_FILE} is damaged"):
        load(folder)
    assert main(["export", str(folder), str(folder / "out")]) == BAD_INPUT
    assert SIDECAR_FILE in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"configs": 5, "parts": 5}, {"parts": {"": [{"method": "no_such"}]}},
        {"parts": {"": [{"method": "sigma_reparam", "init": []}]}}, {"parts": {"": ["text"]}},
        {"parts": {"": [{}]}}, {"checksum": None}, {"format_version": "one"}, {"shards": 3},
        {"shards": ["../secret.safetensors"]}, {"provenance": []}, {"hf_stable_version": None},
    ],
    ids=str,
)  # fmt: skip
def test_metadata_of_wrong_types(changes, folder, capsys):
    rewrite(folder / SIDECAR_FILE, lambda description: description.update(changes))
    with pytest.raises(ValueError, match=rf"{SIDECAR_FILE} is damaged"):
        load(folder)
    assert main(["export", str(folder), str(folder / "out")]) == BAD_INPUT
    assert SIDECAR_FILE in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{", '{"n_layer": NaN', "\ud800", "[" * 100_000])
@pytest.mark.parametrize("command", ["export", "fold"])
def test_a_damaged_config_is_named(command, text, folder, capsys):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert main([command, str(folder), str(folder.parent / command)]) == BAD_INPUT
    assert "config.json is damaged" in " ".join(capsys.readouterr().err.split())
    assert not (folder.parent / command).exists()


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

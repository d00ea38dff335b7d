"""Saving a patched model as plain weights."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from contract_models import SAME
from safetensors.torch import load_file
from tiny_models import DEFAULT_HEADS, MODEL_TYPES, sgd_steps, tiny_batch, tiny_model
from tiny_training import same_state
from trained_models import logits_of, trained

import hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.checkpoints.sidecar import read_state
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import sigma_layers

PLAIN_LOADER = """
import json, sys, warnings
import torch, transformers
records = []
class Catch(__import__("logging").Handler):
    def emit(self, record): records.append(record.getMessage())
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.get_logger().addHandler(Catch())
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    for folder, head, inputs, outputs in json.loads(sys.argv[1]):
        cls = getattr(transformers, head)
        model, info = cls.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), (folder, info)
        with torch.no_grad():
            logits = model(**torch.load(inputs)).logits
        torch.testing.assert_close(logits, torch.load(outputs), **SAME)
assert not caught and not records, ([str(w) for w in caught], records)
assert "hf_stable" not in sys.modules
print("loaded")
""".replace("SAME", str(SAME))


def weight_files(folder) -> list[Path]:
    return sorted(Path(folder).glob("model*.safetensors"))


@pytest.mark.slow
def test_another_process_without_hf_stable_loads_the_plain_weights(tmp_path):
    cases = []
    for model_type in MODEL_TYPES:
        for size in ("50GB", "20KB"):
            model = trained(model_type)
            if size == "20KB" and model_type == "vit":
                model = hf_stable.patch(tiny_model("vit", hidden_size=32), "sigma_reparam")
                sgd_steps(model)
                model.eval()
            folder = tmp_path / f"{model_type}-{size}"
            model.save_pretrained(folder, max_shard_size=size)
            assert (len(weight_files(folder)) > 1) == (size == "20KB")
            assert (folder / SIDECAR_FILE).is_file()
            batch = tiny_batch(model)
            batch.pop("labels")
            torch.save(batch, folder / "inputs.pt")
            torch.save(logits_of(model), folder / "outputs.pt")
            paths = [str(folder / name) for name in ("inputs.pt", "outputs.pt")]
            cases.append([str(folder), DEFAULT_HEADS[model_type], *paths])
    result = subprocess.run(
        [sys.executable, "-c", PLAIN_LOADER, json.dumps(cases)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "loaded"


def test_saved_names_are_those_of_the_plain_model(model_type, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "plain")
    trained(model_type).save_pretrained(tmp_path / "patched")
    plain, patched = (
        load_file(tmp_path / kind / "model.safetensors") for kind in ("plain", "patched")
    )
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in patched.items()}
    raw = trained(model_type).state_dict()
    layer = next(name for name in raw if name.endswith(".gamma")).removesuffix(".gamma")
    assert f"{layer}.weight" in read_state(tmp_path / "patched").tensors


def test_saving_leaves_the_model_and_the_given_state_dict_alone(model_type, tmp_path):
    model = trained(model_type)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = model.state_dict()
    model.save_pretrained(tmp_path, state_dict=given)
    assert given.keys() == before.keys()
    assert all(torch.equal(given[key], before[key]) for key in before)
    assert all(isinstance(layer, SigmaLayer) for _, layer in sigma_layers(model))
    assert len(sigma_layers(model)) > 0


def test_the_state_dict_that_is_given_is_what_gets_saved(tmp_path):
    model = trained("vit")
    name, layer = sigma_layers(model)[0]
    given = {key: value.clone() for key, value in model.state_dict().items()}
    given[f"{name}.gamma"] *= 2
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "given", state_dict=given)
    own, other = (
        transformers.ViTForImageClassification.from_pretrained(tmp_path / kind)
        for kind in ("own", "given")
    )
    torch.testing.assert_close(
        other.get_submodule(name).weight, 2 * own.get_submodule(name).weight, rtol=0, atol=0
    )
    loaded = hf_stable.load(transformers.ViTForImageClassification, tmp_path / "given")
    assert torch.equal(loaded.get_submodule(name).gamma, given[f"{name}.gamma"])
    assert not torch.equal(loaded.get_submodule(name).gamma, layer.gamma)


def test_a_wrappers_state_dict_is_refused(tmp_path):
    model = trained("vit")
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'module\..*sigma_u'.*state dict of a wrapper"):
        model.save_pretrained(tmp_path, state_dict=wrapped)
    assert not weight_files(tmp_path)


def test_a_plain_models_state_dict_is_refused(tmp_path):
    model = trained("vit")
    plain = hf_stable.fold(copy.deepcopy(model)).state_dict()
    with pytest.raises(ValueError, match=r"the weight of '.*' but not its gamma.*scaled twice"):
        model.save_pretrained(tmp_path, state_dict=plain)
    assert not weight_files(tmp_path)


def test_a_state_dict_without_buffers_is_that_of_the_model(tmp_path):
    model = trained("vit", init="one")
    model.save_pretrained(tmp_path, state_dict=dict(model.named_parameters()))
    assert same_state(hf_stable.load(type(model), tmp_path), model)
    plain = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(plain.eval()), logits_of(model), **SAME)


def test_weights_of_a_patched_model_lie_aligned_wherever_they_come_from(tmp_path):
    """A product with a vector rounds otherwise where a file's bytes happen to lie."""
    tiny_model("swin").save_pretrained(tmp_path)
    model = transformers.SwinForImageClassification.from_pretrained(tmp_path)
    weights = dict(model.named_parameters())
    assert any(weight.data_ptr() % 64 for weight in weights.values())
    hf_stable.patch(model, "sigma_reparam")
    for name, layer in sigma_layers(model):
        assert layer.weight is weights[f"{name}.weight"] and layer.weight.data_ptr() % 64 == 0


def test_only_the_saving_process_writes(tmp_path):
    trained("vit").save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / SIDECAR_FILE).exists()


def test_blocks_wrapped_for_activation_checkpointing_are_saved_by_their_own_names(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = trained("gpt2")
    expected = logits_of(model)
    model.transformer.h[1] = checkpoint_wrapper(model.transformer.h[1])
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    model.save_pretrained(tmp_path)
    loaded = hf_stable.load(type(model), tmp_path)
    assert torch.equal(logits_of(loaded), expected)
    plain = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(plain.eval()), expected, **SAME)

"""Saving a patched model as plain weights, and loading it back exactly."""

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
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import DEFAULT_HEADS, MODEL_TYPES, sgd_steps, tiny_batch, tiny_model
from tiny_training import same_state
from torch.distributed.tensor import Replicate, distribute_tensor

import hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.checkpoints.sidecar import read_state
from hf_stable.checkpoints.state_dicts import fold_state_dict
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import sigma_layers

# A folded weight rounds gamma / sigma * W once; on activations the product rounds elsewhere.
ROUNDING = dict(rtol=1e-4, atol=1e-5)

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
        torch.testing.assert_close(logits, torch.load(outputs), rtol=1e-4, atol=1e-5)
assert not caught and not records, ([str(w) for w in caught], records)
assert "hf_stable" not in sys.modules
print("loaded")
"""


def trained(model_type: str, **options):
    """A patched model whose weights, sigma and gamma have moved, in evaluation mode."""
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam", **options)
    sgd_steps(model)
    return model.eval()


def logits_of(model):
    inputs = {key: value for key, value in tiny_batch(model).items() if key != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


def weight_files(folder) -> list[Path]:
    return sorted(Path(folder).glob("model*.safetensors"))


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
    torch.testing.assert_close(logits_of(plain.eval()), logits_of(model), **ROUNDING)


def test_weights_of_a_patched_model_lie_aligned_wherever_they_come_from(tmp_path):
    """A product with a vector rounds otherwise where a file's bytes happen to lie."""
    tiny_model("swin").save_pretrained(tmp_path)
    model = transformers.SwinForImageClassification.from_pretrained(tmp_path)
    weights = dict(model.named_parameters())
    assert any(weight.data_ptr() % 64 for weight in weights.values())
    hf_stable.patch(model, "sigma_reparam")
    for name, layer in sigma_layers(model):
        assert layer.weight is weights[f"{name}.weight"] and layer.weight.data_ptr() % 64 == 0


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
    assert base.h[0].attn.c_attn.num_blocks == 1


def test_load_in_another_dtype(tmp_path):
    model = trained("vit")
    model.save_pretrained(tmp_path)
    loaded = hf_stable.load(type(model), tmp_path, dtype=torch.bfloat16)
    for (_, layer), (_, original) in zip(sigma_layers(loaded), sigma_layers(model), strict=True):
        assert torch.equal(layer.weight, original.weight.bfloat16())
        assert torch.equal(layer.gamma, original.gamma)


def test_saving_a_folded_model_removes_the_sidecar(tmp_path):
    model = trained("vit")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert list(tmp_path.glob("hf_stable_state*"))
    hf_stable.fold(model).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("hf_stable_state*"))
    with pytest.raises(FileNotFoundError, match=f"{SIDECAR_FILE} is missing.*from_pretrained"):
        hf_stable.load(type(model), tmp_path)


def test_saving_again_leaves_no_shard_of_the_earlier_sidecar(tmp_path):
    model = trained("swin")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / f"{SIDECAR_FILE}.tmp").write_bytes(b"of a killed process")
    assert len(list(tmp_path.glob("hf_stable_state*"))) > 2
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("hf_stable_state*")] == [SIDECAR_FILE]
    assert same_state(hf_stable.load(type(model), tmp_path), model)


def test_part_of_a_model_has_no_sidecar(tmp_path):
    model = trained("vit")
    part = {k: v for k, v in model.state_dict().items() if "layers.0." not in k}
    model.save_pretrained(tmp_path, state_dict=part)
    assert not any(key.endswith(("gamma", "sigma")) for key in load_file(weight_files(tmp_path)[0]))
    assert not (tmp_path / SIDECAR_FILE).exists()


def test_only_the_saving_process_writes(tmp_path):
    trained("vit").save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / SIDECAR_FILE).exists()


def test_sidecar_is_plain_safetensors_with_readable_metadata(tmp_path):
    trained("gpt2", init="one").save_pretrained(tmp_path)
    with safe_open(tmp_path / SIDECAR_FILE, framework="pt") as file:
        description = json.loads(file.metadata()["hf_stable"])
        assert "transformer.h.0.attn.c_attn.sigma_u" in file.keys()  # noqa: SIM118
    assert description["format_version"] == 1
    assert description["hf_stable_version"] == hf_stable.__version__
    assert description["configs"][0]["method"] == "sigma_reparam"
    assert description["configs"][0]["init"] == "one"


def test_patching_after_from_pretrained_warns_and_names_load(tmp_path):
    trained("vit").save_pretrained(tmp_path)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"use hf_stable\.load"):
        hf_stable.patch(model, "sigma_reparam")


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
    torch.testing.assert_close(logits_of(plain.eval()), expected, rtol=1e-4, atol=1e-5)

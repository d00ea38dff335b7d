"""The file beside the plain weights."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_training import same_state
from trained_models import trained

import hf_stable
from hf_stable._file_names import SIDECAR_FILE


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
    killed = tmp_path / f".{SIDECAR_FILE}.0123456789abcdef.tmp"
    killed.write_bytes(b"of a killed process")
    assert len(list(tmp_path.glob("hf_stable_state*"))) > 2
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*hf_stable_state*")] == [SIDECAR_FILE]
    assert same_state(hf_stable.load(type(model), tmp_path), model)


def test_sidecar_is_plain_safetensors_with_readable_metadata(tmp_path):
    trained("gpt2", init="one").save_pretrained(tmp_path)
    with safe_open(tmp_path / SIDECAR_FILE, framework="pt") as file:
        description = json.loads(file.metadata()["hf_stable"])
        assert "transformer.h.0.attn.c_attn.sigma_u" in file.keys()  # noqa: SIM118
    assert description["format_version"] == 1
    assert description["hf_stable_version"] == hf_stable.__version__
    assert description["configs"][0]["method"] == "sigma_reparam"
    assert description["configs"][0]["init"] == "one"


def test_part_of_a_model_has_no_sidecar(tmp_path):
    model = trained("vit")
    part = {k: v for k, v in model.state_dict().items() if "layers.0." not in k}
    model.save_pretrained(tmp_path, state_dict=part)
    assert not any(
        key.endswith(("gamma", "sigma")) for key in load_file(tmp_path / "model.safetensors")
    )
    assert not (tmp_path / SIDECAR_FILE).exists()

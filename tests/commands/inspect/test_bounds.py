"""What is inspected bounds what inspecting it takes: files opened, models built, time waited."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model

from hf_stable.checkpoints import weight_files
from hf_stable.checkpoints.described_models import empty_model
from hf_stable.checkpoints.weight_files import open_weights
from hf_stable.commands.conventions import BAD_INPUT
from hf_stable.commands.inspect.inspection import inspect_checkpoint
from hf_stable.commands.main import main


@pytest.fixture
def saved(tmp_path):
    """A folder of a tiny GPT-2, and what rewrites its config."""
    tiny_model("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())

    def rewrite(**fields):
        path.write_text(json.dumps(content | fields))
        return tmp_path

    return rewrite


def test_a_file_is_opened_once_however_many_tensors_it_has(monkeypatch, tmp_path):
    save_file(
        {f"t{i}": torch.full((2, 2), float(i)) for i in range(300)}, tmp_path / "m.safetensors"
    )
    opened, safe_open = [], weight_files.safe_open
    monkeypatch.setattr(
        weight_files, "safe_open", lambda *args, **kw: opened.append(args) or safe_open(*args, **kw)
    )
    report = inspect_checkpoint(tmp_path)
    assert len(opened) == 2  # its header, then its tensors
    assert [layer.sigma for layer in report.layers[:3]] == [
        (pytest.approx(2.0 * float(layer.name[1:])),) if layer.name != "t0" else (0.0,)
        for layer in report.layers[:3]
    ]


def test_what_has_been_read_does_not_stay_in_memory(monkeypatch, tmp_path):
    save_file(
        {f"t{i}": torch.full((64, 64), float(i)) for i in range(8)}, tmp_path / "m.safetensors"
    )
    opened, safe_open = [], weight_files.safe_open
    monkeypatch.setattr(weight_files, "MOST_MAPPED", 2 * 64 * 64 * 4)
    weights = open_weights(tmp_path)
    monkeypatch.setattr(
        weight_files, "safe_open", lambda *args, **kw: opened.append(args) or safe_open(*args, **kw)
    )
    assert {name: tensor[0, 0].item() for name, tensor in weights} == {
        f"t{i}": float(i) for i in range(8)
    }
    assert len(opened) == 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_layer": 10**9}, "config.json says n_layer=1000000000"),
        ({"n_layer": 10**6}, "parameters, and there are"),
        ({"task_specific_params": {"a": [{"b": 10**9}]}}, "task_specific_params.a.b=1000000000"),
    ],
)
def test_nothing_is_built_from_a_number_that_the_weights_do_not_bear_out(saved, fields, said):
    start = time.monotonic()
    report = inspect_checkpoint(saved(**fields))
    assert said in report.blocks_note and not report.blocks
    assert len(report.layers) > 8 and report.is_healthy
    assert time.monotonic() - start < 30


def test_labels_are_not_counted_out(saved):
    report = inspect_checkpoint(saved(num_labels=10**9))
    assert report.blocks and report.blocks == inspect_checkpoint(saved()).blocks


@pytest.mark.parametrize("name", ["model.safetensors", "hf_stable_state.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(saved, capsys, name):
    folder = saved()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert main(["inspect", str(folder / name)]) == BAD_INPUT
    assert "nor a regular file" in capsys.readouterr().err
    if name == "model.safetensors":
        assert main(["inspect", str(folder)]) == BAD_INPUT
    else:
        assert inspect_checkpoint(folder).kind == "plain"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_on_the_hub_is_never_asked_for(saved, key):
    report = inspect_checkpoint(saved(**{key: "somebody/kernel"}))
    assert report.blocks and report.blocks_note is None
    assert "/" not in empty_model(saved(**{key: "somebody/kernel"})).config._attn_implementation

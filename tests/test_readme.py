"""README.md is run as it is printed, and names everything that is public."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

import hf_stable

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def block(name: str) -> str:
    """Return the code block behind a marker."""
    found = re.search(rf"<!-- run: {name} -->\n```\w+\n(.*?)```", README, flags=re.S)
    assert found, f"README.md lost its {name} block"
    return found[1]


@pytest.mark.usefixtures("own_registry")
def test_own_architecture_block_makes_a_llama_patchable():
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(6)[None]
    before = model(ids).logits
    with pytest.raises(hf_stable.UnsupportedModelError, match="llama"):
        hf_stable.patch(model, "sigma_reparam")
    exec(block("own-architecture"), {})
    hf_stable.patch(model, "sigma_reparam")
    assert hf_stable.describe(model).num_patched == 7
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_every_public_name_is_in_the_readme():
    missing = [name for name in hf_stable.__all__ if not re.search(rf"\b{name}\b", README)]
    assert missing == []


def test_every_command_in_the_readme_exists():
    import typer

    from hf_stable.cli import app

    commands = {command.name for command in typer.main.get_command(app).commands.values()}
    named = set(re.findall(r"`hf-stable ([a-z]+)", README))
    assert named <= commands
    assert commands <= named, "a command that README.md does not name"


def test_the_two_commands_install_torch_first():
    for name in ("main-job", "tests"):
        assert block(name).startswith("pip install torch==2.13.0 && pip install -e ")


def test_rates_of_alarms_are_those_of_the_replayed_runs():
    evidence = Path(__file__).resolve().parents[1] / "recipes" / "evidence" / "alarms.json"
    rates = json.loads(evidence.read_text())["other seeds"]
    said = " ".join(README.split())
    for sentence in (
        "{false_alarms} of {healthy} healthy runs raised an alarm",
        "{missed} of {collapsed} collapsed ones did not",
        "{alarms_before_loss_was_lost} alarms came before",
    ):
        assert sentence.format(**rates) in said


@pytest.mark.parametrize("name", ["plain-loop", "accelerate-loop"])
def test_loops_train_and_leave_a_plain_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block(name), names)
    losses = names["losses"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    model = names.get("plain", names["model"])
    assert not hf_stable.is_patched(model)
    loaded = transformers.ViTForImageClassification.from_pretrained(f"{name}-output").eval()
    pixels = names["images"][:8]
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(loaded(pixel_values=pixels).logits, expected)
    if name == "plain-loop":
        assert len(names["records"].entropy) == 2

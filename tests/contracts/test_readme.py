"""What documents show does what they say, and their numbers are those of committed results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from statistics import mean

import pytest
import torch
import transformers
from documents import README, ROOT, named_block
from huggingface_hub.errors import StrictDataclassFieldValidationError

import hf_stable

GUIDES = ROOT / "docs" / "guides"
MONITOR = ROOT / "hf_stable" / "monitor" / "README.md"
ADAMW2 = ROOT / "hf_stable" / "adamw2" / "README.md"
PLACES = {
    "own-architecture": GUIDES / "your-own-architecture.md",
    "plain-loop": GUIDES / "plain-loops.md",
    "accelerate-loop": GUIDES / "plain-loops.md",
    "monitor": MONITOR,
    "main-job": README,
    "tests": README,
}
"""Name of a block -> the document that has it."""


def block(name: str) -> str:
    """Return the code block behind a marker."""
    return named_block(PLACES[name], name)


@pytest.mark.usefixtures("own_registry")
def test_own_architecture_block_makes_a_model_patchable():
    config = transformers.HeliumConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.HeliumForCausalLM(config).eval()
    ids = torch.arange(6)[None]
    before = model(ids).logits
    with pytest.raises(hf_stable.UnsupportedModelError, match="helium"):
        hf_stable.patch(model, "sigma_reparam")
    exec(block("own-architecture"), {})
    hf_stable.patch(model, "sigma_reparam")
    assert hf_stable.describe(model).num_patched == 7
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    with hf_stable.probe(model) as records:
        model(ids)
    (name,) = records.sigma_qk  # two heads share one key head
    assert name == "model.layers.0" and records.entropy[name].shape == (2,)
    attention = model.model.layers[0].self_attn
    query, key = (
        layer.weight * layer.gamma / layer.sigma for layer in (attention.q_proj, attention.k_proj)
    )
    exact = [torch.linalg.matrix_norm(head.T @ key, 2) for head in query.chunk(2)]
    torch.testing.assert_close(records.sigma_qk[name], torch.stack(exact))


@pytest.mark.usefixtures("own_registry")
def test_an_own_architecture_without_norms_is_exported_as_the_table_says(tmp_path):
    exec(block("own-architecture"), {})
    config = transformers.HeliumConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = hf_stable.patch(transformers.HeliumForCausalLM(config).eval(), "remove_pre_layernorm")
    hf_stable.export(model, tmp_path / "exported")
    model.save_pretrained(tmp_path / "saved")
    auto_class, ids = transformers.AutoModelForCausalLM, torch.arange(6)[None]
    for folder in (tmp_path / "exported", tmp_path / "saved"):
        with pytest.raises(StrictDataclassFieldValidationError, match="LayerNorms of this model"):
            transformers.HeliumForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto_class.from_pretrained(folder, trust_remote_code=False)
        loaded = auto_class.from_pretrained(folder, trust_remote_code=True)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    loaded = hf_stable.load(transformers.HeliumForCausalLM, tmp_path / "saved")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_the_two_commands_install_torch_first():
    for name in ("main-job", "tests"):
        assert block(name).startswith("pip install torch==2.13.0 && pip install -e ")


def test_the_number_of_shipped_models_is_that_of_the_registry():
    number = len(hf_stable.supported_architectures())
    assert f"\n{number} model types are shipped" in README.read_text()


def test_rates_of_alarms_are_those_of_the_replayed_runs():
    evidence = ROOT / "recipes" / "evidence"
    found = json.loads((evidence / "alarms.json").read_text())
    rates = found["reported"]
    *leads, last = [lead for lead in rates["leads"] if lead > 0]
    reported = [run for run in found["runs"] if run["seed"] in found["seeds"]["reported_on"]]
    stalls = [run["alarm"] for run in reported if run["run"] == "GPT-2, 3e-2"]
    said = " ".join(MONITOR.read_text().split())
    for sentence in (
        f"{rates['false_alarms']} of {rates['healthy']} healthy runs raised an alarm",
        f"{rates['missed']} of {rates['collapsed']} collapsed ones did not",
        f"{rates['in_time']} of {len(rates['leads'])} alarms came before, "
        f"by {', '.join(map(str, leads))} and {last} steps",
        f"at steps {min(stalls)} to {max(stalls)} of 150",
    ):
        assert sentence in said
    missed = {r["model"] for r in reported if r["kind"] == "collapsed" and r["alarm"] is None}
    assert missed == {"swin"}
    guide = " ".join((evidence.parent / "README.md").read_text().split())
    by_model = found["reported_by_model"]
    for model, name in (("vit", "ViT"), ("gpt2", "GPT-2"), ("swin", "Swin"), ("bert", "BERT")):
        each = by_model[model]
        caught = each["collapsed"] - each["missed"]
        assert f"{name} {caught} of {each['collapsed']}" in guide


def test_accuracies_of_lora_are_those_of_the_recipe():
    evidence = ROOT / "recipes" / "evidence" / "lora.json"
    runs = json.loads(evidence.read_text())["runs"]
    rates = sorted({run["learning_rate"] for run in runs})
    card = ADAMW2.read_text()
    lines = card[card.index("python recipes/lora.py") :].partition("| AdamW |")[0].splitlines()
    header = next(line for line in lines if line.startswith("| |"))
    assert [float(cell) for cell in header.split("|")[2:-1]] == rates
    names = {
        "AdamW": "AdamW",
        "AdamW2, factors apart": "AdamW2, factors",
        "AdamW2, `lora=merged`": "AdamW2, merged",
    }
    assert {run["optimizer"] for run in runs} == set(names.values())
    for said, optimizer in names.items():
        row = re.search(rf"^\| {re.escape(said)} \|(.*)\|$", card, flags=re.M)
        means = [
            mean(r["test_accuracy"] for r in runs if (r["optimizer"], r["learning_rate"]) == key)
            for key in product([optimizer], rates)
        ]
        assert [cell.strip() for cell in row[1].split("|")] == [f"{m:.2f}"[1:] for m in means]


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


@pytest.mark.slow
def test_accelerate_loop_trains_one_model_on_two_processes(tmp_path):
    ending = """
import torch.distributed as dist
weights = torch.cat([p.detach().flatten() for p in plain.parameters()])
torch.save((accelerator.num_processes, losses, weights), f"rank{accelerator.process_index}.pt")
accelerator.wait_for_everyone()
dist.destroy_process_group()
"""
    (tmp_path / "loop.py").write_text(block("accelerate-loop") + ending)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "loop.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (number, losses, first), (_, others, second) = (
        torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)
    )
    assert number == 2 and torch.equal(first, second)
    assert losses != others  # of other data
    assert sum(losses[-3:]) < 0.96 * sum(losses[:3])  # in half as many steps as alone
    loaded = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "accelerate-loop-output"
    )
    assert torch.equal(torch.cat([p.detach().flatten() for p in loaded.parameters()]), first)


@pytest.mark.filterwarnings("ignore:StabilityCallback")
def test_the_monitored_run_is_probed_and_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block("monitor"), names)
    assert names["trainer"].state.global_step == 60  # no alarm stopped it
    said = re.findall(r"step (\d+): loss ([\d.]+), entropy [\d.]+ nats", capsys.readouterr().out)
    assert [int(step) for step, _ in said] == [1, 2, 4, 8, 16, 20, 40, 60]
    assert float(said[-1][1]) < 0.9 * float(said[0][1])

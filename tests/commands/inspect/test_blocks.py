"""Heads, norms, signs and differences of checkpoints, against the models that wrote them."""

from __future__ import annotations

import json
import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import sgd_steps, tiny_batch, tiny_model
from transformers import HeliumConfig, HeliumForCausalLM

import hf_stable
from hf_stable.checkpoints.hub_files import local_files
from hf_stable.checkpoints.weight_files import WeightFiles
from hf_stable.commands.conventions import BAD_INPUT, NO, SUCCESS
from hf_stable.commands.inspect.comparison import compare_checkpoints
from hf_stable.commands.inspect.inspection import inspect_checkpoint
from hf_stable.commands.main import main

METHOD = {
    "gpt2": "remove_pre_layernorm",
    "vit": "remove_pre_layernorm",
    "swin": "remove_pre_layernorm",
    "bert": "remove_layernorm",
}


def trained(model_type, methods="sigma_reparam"):
    model = hf_stable.patch(tiny_model(model_type), methods)
    sgd_steps(model)
    return model


def probed(model):
    """What the probe measures of the same model in memory."""
    with hf_stable.probe(model, terms=["sigma_qk", "sec", "stable_rank"]) as records:
        model(**tiny_batch(model))
    return records.to_dict()


@pytest.mark.parametrize("kind", ["plain", "patched", "folded", "without norms"])
def test_heads_are_those_that_the_probe_measures(model_type, kind, tmp_path):
    model = tiny_model(model_type)
    if kind != "plain":
        methods = ["sigma_reparam", METHOD[model_type]] if "norms" in kind else "sigma_reparam"
        model = trained(model_type, methods)
    if kind == "folded":
        hf_stable.fold(model)
    model.save_pretrained(tmp_path)
    report = inspect_checkpoint(tmp_path)
    expected = probed(model)
    assert [block.name for block in report.blocks] == list(expected["sigma_qk"])
    for block in report.blocks:
        for name in ("sigma_qk", "sec", "stable_rank"):
            heads = expected[name][block.name]
            assert getattr(block, name) == pytest.approx(heads, rel=1e-4), name
    assert len({block.sigma_qk for block in report.blocks}) == len(report.blocks)
    gains = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    for norm in report.norms:
        assert norm.norm == pytest.approx(gains[norm.name].weight.norm().item(), rel=1e-6)
    assert report.norms
    assert report.blocks_note is None and report.is_healthy


def test_without_a_config_the_matrices_alone_are_shown_with_the_reason(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    report = inspect_checkpoint(tmp_path)
    assert not report.blocks and "there is no config.json" in report.blocks_note
    assert len(report.layers) > 10 and "heads were not looked at" in report.verdict


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_stands_out_is_said(tmp_path):
    model = tiny_model("vit", num_hidden_layers=4)
    model.save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path).signs == ()
    assert inspect_checkpoint(tmp_path).verdict.startswith("Healthy")

    def collapse(tensors):
        for part in ("query", "key"):
            name = f"vit.encoder.layer.2.attention.attention.{part}.weight"
            tensors[name][:8] = 30 * torch.outer(torch.ones(8), torch.ones(16)) / 8
            tensors["vit.encoder.layer.1.intermediate.dense.weight"].zero_()

    edit(tmp_path, collapse)
    report = inspect_checkpoint(tmp_path)
    said = " ".join(report.signs)
    assert report.is_healthy and f"{len(report.signs)} sign" in report.verdict
    assert "layers.2, head 0 looks collapsed" in said or "layer.2, head 0 looks collapsed" in said
    assert "vit.encoder.layer.1.intermediate.dense is all zero" in said
    assert "times the median of its like" in said

    def spoil(tensors):
        tensors["vit.encoder.layer.0.attention.attention.key.weight"][0, 0] = float("nan")

    edit(tmp_path, spoil)
    report = inspect_checkpoint(tmp_path)
    assert not report.is_healthy and not report.blocks[0].finite and report.blocks[1].finite
    assert "has NaN or infinite entries" in " ".join(report.signs)


def large(tensors, block, rank):
    """Give each of the four heads of a GPT-2 block `rank` singular values of Wq^T Wk, all 1600."""
    weight = tensors[f"transformer.h.{block}.attn.c_attn.weight"]
    width, size = len(weight), len(weight) // 4
    generator = torch.Generator().manual_seed(0)
    for start in range(0, 2 * width, size):
        directions = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q
        weight[:, start : start + size] = 40 * directions @ torch.eye(rank, size)


@pytest.mark.parametrize(
    ("width", "rank", "blocks", "said"),
    [
        (32, 1, [0, 1, 2], "transformer.h.1: 4 of 4 heads look collapsed"),
        (32, 1, [1], "transformer.h.1, head 3 looks collapsed"),
        (32, 8, [0, 1, 2], None),
        (32, 8, [1], None),
        (16, 4, [0, 1, 2], None),  # d_q is 4: its full rank
        (16, 4, [1], None),
    ],
)
def test_heads_that_collapsed_are_said_and_large_ones_of_full_rank_are_not(
    width, rank, blocks, said, tmp_path
):
    model = tiny_model("gpt2", n_embd=width, n_head=4, n_layer=3)
    model.save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path).signs == ()
    edit(tmp_path, lambda tensors: [large(tensors, block, rank) for block in blocks])
    report = inspect_checkpoint(tmp_path)
    changed = report.blocks[1]
    assert changed.head_size == width // 4 and changed.sigma_qk == pytest.approx([1600] * 4)
    assert (min(changed.sec) > 0.99) == (rank <= 4)
    signs = [sign for sign in report.signs if "collapsed" in sign]
    assert any(said in sign for sign in signs) if said else not signs


def test_two_checkpoints_differ_by_what_was_trained_between(model_type, tmp_path):
    model = trained(model_type)
    model.save_pretrained(tmp_path / "a")
    before = dict(hf_stable.fold(trained(model_type)).named_parameters())
    sgd_steps(model)
    model.save_pretrained(tmp_path / "b")
    found = compare_checkpoints(tmp_path / "a", tmp_path / "b")
    after = dict(hf_stable.fold(model).named_parameters())
    assert not found.is_same and not found.only_first and not found.only_second
    for change in found.matrices:
        name = f"{change.name}.weight" if f"{change.name}.weight" in after else change.name
        moved = (after[name] - before[name]).norm() / before[name].norm()
        assert change.distance == pytest.approx(moved.item(), rel=1e-3, abs=1e-6)
    distances = [change.distance for change in found.matrices]
    assert distances == sorted(distances, reverse=True) and distances[0] > 0
    assert found.heads and any(head.sigma_qk[0] != head.sigma_qk[1] for head in found.heads)
    assert compare_checkpoints(tmp_path / "a", tmp_path / "a").is_same


def test_a_patched_and_the_folded_checkpoint_hold_the_same_weights(tmp_path):
    model = trained("vit")
    model.save_pretrained(tmp_path / "patched")
    hf_stable.fold(model).save_pretrained(tmp_path / "plain")
    assert compare_checkpoints(tmp_path / "patched", tmp_path / "plain").is_same
    shutil.copytree(tmp_path / "plain", tmp_path / "other")
    edit(tmp_path / "other", lambda tensors: tensors.pop("classifier.weight"))
    found = compare_checkpoints(tmp_path / "plain", tmp_path / "other")
    assert found.only_first == ("classifier.weight",) and not found.is_same


@pytest.mark.parametrize("name", ["vit.encoder.layer.0.intermediate.dense.bias",
                                  "vit.encoder.layer.1.layernorm_before.weight"])  # fmt: skip
def test_a_gain_or_bias_that_differs_is_a_difference(name, tmp_path, capsys):
    tiny_model("vit").save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert compare_checkpoints(tmp_path / "a", tmp_path / "b").is_same
    edit(tmp_path / "b", lambda tensors: tensors[name].add_(0.5))
    found = compare_checkpoints(tmp_path / "a", tmp_path / "b")
    assert not found.is_same and all(change.distance == 0 for change in found.matrices)
    before, after = (load_file(tmp_path / d / "model.safetensors")[name] for d in "ab")
    changed = found.vectors[0]
    assert changed.norm == pytest.approx((before.norm().item(), after.norm().item()))
    assert [v.name for v in found.vectors if v.distance] == [changed.name]
    assert main(["inspect", str(tmp_path / "a"), str(tmp_path / "b")]) == NO
    shown = capsys.readouterr().out
    assert "Gains and biases, the most changed first" in shown and changed.name in shown


@pytest.mark.parametrize("change", [1e-30, float("nan")])
def test_the_smallest_difference_and_nan_are_differences_too(change, tmp_path):
    save_file({"a.bias": torch.zeros(3), "b.weight": torch.eye(2)}, tmp_path / "a.safetensors")
    save_file({"a.bias": torch.full((3,), change), "b.weight": torch.eye(2)},
              tmp_path / "b.safetensors")  # fmt: skip
    found = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not found.is_same and found.matrices[0].distance == 0
    json.dumps(found.to_dict(), allow_nan=False)


def grow(tensors):
    for name in list(tensors):
        if name.endswith("wte.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(3, 16)])
        elif name.endswith("h.0.ln_1.bias"):
            tensors[name] = tensors[name].new_zeros(())


def test_a_tensor_of_another_shape_is_shown_with_both_shapes(tmp_path, capsys):
    tiny_model("gpt2").save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    same = compare_checkpoints(tmp_path / "a", tmp_path / "b")
    assert same.reshaped == () and same.is_same
    edit(tmp_path / "b", grow)
    assert main(["inspect", str(tmp_path / "a"), str(tmp_path / "b")]) == NO
    shown = capsys.readouterr().out
    assert re.search(r"transformer\.wte\.weight +37x16 +40x16\b", shown)
    assert re.search(r"transformer\.h\.0\.ln_1\.bias +16 +scalar\b", shown)
    assert "Only in the" not in shown and "The weights differ." in shown
    assert main(["inspect", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == NO
    content = json.loads(capsys.readouterr().out)
    assert {each["name"]: each["shape"] for each in content["reshaped"]} == {
        "transformer.wte.weight": [[37, 16], [40, 16]],
        "transformer.h.0.ln_1.bias": [[16], []],
    }
    assert content["only_first"] == content["only_second"] == [] and not content["is_same"]
    assert all(change["distance"] == 0 for change in content["matrices"] + content["vectors"])


@pytest.mark.parametrize("spoilt", ["a", "b"])
def test_tensors_of_a_checkpoint_without_a_usable_config_have_the_names_of_the_other(
    spoilt, tmp_path
):
    for folder in ("a", "b"):
        tiny_model("vit").save_pretrained(tmp_path / folder)
    (tmp_path / spoilt / "config.json").write_text("{")
    found = compare_checkpoints(tmp_path / "a", tmp_path / "b")
    assert found.is_same and not found.heads
    assert "vit.layers.0.mlp.fc1" in [change.name for change in found.matrices]
    edit(tmp_path / "b", lambda tensors: tensors["classifier.weight"].add_(1))
    assert not compare_checkpoints(tmp_path / "a", tmp_path / "b").is_same


BAD_VALUES = [
    ({"n_head": 0}, "describes no model that transformers can build"),
    ({"n_head": "two"}, "n_head"),
    ({"n_head": 3}, "num_heads"),
    ({"n_head": -2}, "config.json does not fit the weights of transformer.h.0"),
    ({"n_embd": -3}, "-3"),
    ({"n_embd": 32, "n_head": 32}, "cannot cut weights of shapes (16, 16) and (16, 16)"),
    ({"activation_function": "none such"}, "none such"),
    ({"architectures": ["GPT2Config"]}, "has ['GPT2Config'] under 'architectures'"),
    ({"architectures": ["pipeline"]}, "no model class of transformers"),
    ({"architectures": ["AutoModel"]}, "no model class of transformers"),
    ({"architectures": ["PreTrainedModel"]}, "no model class of transformers"),
    ({"architectures": ["GPT2PreTrainedModel"]}, "no model class of transformers"),
    ({"architectures": ["BertForMaskedLM"]}, "GPT2Config"),
    ({"architectures": [5]}, "has [5] under 'architectures'"),
    ({"architectures": None}, "has None under 'architectures'"),
    ({"model_type": "none_such"}, "none_such"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_a_bad_config_costs_the_heads_and_says_why(change, reason, tmp_path, capsys):
    tiny_model("gpt2").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert main(["inspect", str(tmp_path)]) == SUCCESS
    shown, errors = capsys.readouterr()
    (note,) = [line for line in shown.splitlines() if line.startswith("No heads and norms: ")]
    assert reason in note and "config.json" in note
    assert "Traceback" not in errors and "hf-stable: error" not in errors
    assert re.search(r"transformer\.h\.1\.mlp\.c_fc +16x64 +float32 +[\d.]+", shown)
    assert "heads were not looked at" in shown and "Wq^T Wk of each head" not in shown


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null"])
def test_a_config_that_is_none_costs_the_heads_and_says_why(content, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    report = inspect_checkpoint(tmp_path)
    assert report.layers and not report.blocks
    assert report.blocks_note.startswith(f"{tmp_path / 'config.json'} is damaged")
    assert "\n" not in report.blocks_note


def test_code_beside_the_weights_is_not_run(tmp_path, monkeypatch):
    """transformers would ask, and run it for a yes."""
    tiny_model("gpt2").save_pretrained(tmp_path)
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "import transformers\n"
        "class OwnConfig(transformers.PretrainedConfig):\n    model_type = 'own'\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "cache")
    assert "describes no model" in inspect_checkpoint(tmp_path).blocks_note
    assert not (tmp_path / "ran").exists()


def test_the_command_shows_heads_and_compares(tmp_path, capsys):
    model = trained("gpt2")
    model.save_pretrained(tmp_path / "a")
    sgd_steps(model)
    model.save_pretrained(tmp_path / "b")
    assert main(["inspect", str(tmp_path / "a")]) == SUCCESS
    shown = capsys.readouterr().out
    for part in ("Wq^T Wk of each head", "transformer.h.1", "stable rank", "Norms", "Healthy"):
        assert part in shown
    assert main(["inspect", str(tmp_path / "a"), str(tmp_path / "b")]) == NO
    assert "The weights differ." in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "a"), str(tmp_path / "a"), "--json"]) == SUCCESS
    content = json.loads(capsys.readouterr().out)
    assert content["is_same"] and content["matrices"]
    assert main(["inspect", "nowhere/at-all"]) == BAD_INPUT
    assert "nowhere/at-all does not exist here, and the Hub did not give it" in (
        capsys.readouterr().err
    )


def test_what_is_no_id_is_no_path_either():
    with pytest.raises(FileNotFoundError, match="give a folder, a file or owner/name"):
        local_files("no such/thing at/all")


def test_a_folder_larger_than_memory_would_be_streamed(tmp_path):
    """Peak memory is some of the largest matrices, whatever the number of layers."""
    config = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2)
    peaks = {}
    for depth in (2, 12):
        model = tiny_model("vit", num_hidden_layers=depth, **config)
        model.save_pretrained(tmp_path / str(depth), max_shard_size="500KB")
        size = sum(p.numel() * 4 for p in model.parameters())
        del model
        inspect_checkpoint(tmp_path / str(depth))
        with _PeakTensorBytes() as peak:
            inspect_checkpoint(tmp_path / str(depth))
        peaks[depth] = peak.most
    # One matrix of 128 x 512 at least, and never more than a few.
    assert size > 9e6 and 4 * 128 * 512 <= peaks[2] and peaks[12] < 1.5 * peaks[2] < size / 2


class _PeakTensorBytes:
    """The most bytes of what was read and was alive at once."""

    def __enter__(self):
        self.most, self._read, alive = 0, WeightFiles.read, []

        def read(files, name):
            tensor = self._read(files, name)
            alive.append((weakref.ref(tensor), tensor.nbytes))
            self.most = max(self.most, sum(size for seen, size in alive if seen() is not None))
            return tensor

        WeightFiles.read = read
        return self

    def __exit__(self, *exc):
        WeightFiles.read = self._read


OWN_ENTRY = """
from hf_stable import Architecture, Attention, Block, register_architecture
attention = Attention("self_attn", query="self_attn.q_proj", key="self_attn.k_proj",
                      value="self_attn.v_proj", output="self_attn.o_proj")
register_architecture(Architecture(
    "helium",
    Block("HeliumDecoderLayer", (attention,), mlp_in=("mlp.gate_proj", "mlp.up_proj"),
          mlp_out=("mlp.down_proj",)),
))
"""


def test_heads_of_an_own_architecture_are_seen_by_its_entry(tmp_path, own_registry, capsys):
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    config = HeliumConfig(**sizes, **heads, pad_token_id=0)
    HeliumForCausalLM(config).save_pretrained(tmp_path / "model")
    command = ["inspect", str(tmp_path / "model"), "--json"]
    capsys.readouterr()  # what libraries say of saving
    assert main(command) == SUCCESS
    unknown = json.loads(capsys.readouterr().out)
    assert not unknown["blocks"] and "helium" in unknown["blocks_note"]
    (tmp_path / "entry.py").write_text(OWN_ENTRY)
    assert main([*command, "--register", str(tmp_path / "entry.py")]) == SUCCESS
    found = json.loads(capsys.readouterr().out)["blocks"]
    assert len(found) == 2 and all(len(block["sigma_qk"]) == 4 for block in found)
    assert main([*command, "--register", str(tmp_path / "none.py")]) == BAD_INPUT
    assert "none.py: no such file" in capsys.readouterr().err

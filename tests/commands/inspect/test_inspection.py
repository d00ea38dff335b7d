"""Streamed reading of checkpoints, against the models that wrote them."""

import json
import re
import shutil

import pytest
import torch
from hub_stand_in import Repo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import sgd_steps, tiny_model

import hf_stable
from hf_stable.checkpoints.weight_files import MOST_MAPPED
from hf_stable.commands.conventions import BAD_INPUT, NO, SUCCESS
from hf_stable.commands.inspect.inspection import inspect_checkpoint
from hf_stable.commands.main import main
from hf_stable.measures.matrices import as_matrix

# A singular value of float32 entries is known to some 1e-6 of itself.
RTOL = 1e-5


def trained(model_type, **options):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam", **options)
    sgd_steps(model)
    return model


def sigma_by_layer(report):
    return {layer.name: layer.sigma for layer in report.layers}


@pytest.fixture
def saved(model_type, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_sigma_of_each_matrix_is_its_largest_singular_value(saved):
    report = inspect_checkpoint(saved)
    tensors = load_file(saved / "model.safetensors")
    assert report.kind == "plain" and report.is_healthy
    assert report.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert len(report.layers) >= 10
    for layer in report.layers:
        tensor = tensors.get(f"{layer.name}.weight", tensors.get(layer.name))
        assert layer.shape == tuple(tensor.shape)
        assert layer.gamma == layer.raw_sigma == ()
        expected = torch.linalg.svdvals(as_matrix(tensor))[0].item()
        assert layer.sigma == pytest.approx((expected,), rel=RTOL, abs=1e-12)


def test_every_patched_layer_is_among_the_matrices(model_type, tmp_path):
    model = trained(model_type)
    model.save_pretrained(tmp_path)
    report = inspect_checkpoint(tmp_path)
    expected = [row for row in hf_stable.describe(model).layers if row.skipped is None]
    assert report.kind == "folded" and report.is_healthy
    assert sorted((row.gamma, row.sigma) for row in expected) == sorted(
        (layer.gamma, layer.raw_sigma) for layer in report.layers if layer.gamma
    )
    # sigma is that of the folded weight, which is on disk: |gamma| as far as it is tracked.
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in report.layers:
        if layer.gamma:
            matrix = as_matrix(tensors[f"{layer.name}.weight"])
            blocks = (matrix.T if model_type == "gpt2" else matrix).chunk(len(layer.gamma))
            exact = [torch.linalg.svdvals(block)[0].item() for block in blocks]
            assert layer.sigma == pytest.approx(exact, rel=RTOL)
            assert layer.sigma != layer.raw_sigma


@pytest.mark.parametrize("model_type", ["vit", "swin"], indirect=True)
def test_layers_are_paired_across_the_names_on_disk_and_in_memory(model_type, tmp_path):
    model = trained(model_type)
    model.save_pretrained(tmp_path)
    gammas = {layer.name: layer.gamma for layer in inspect_checkpoint(tmp_path).layers}
    in_memory, on_disk = {
        "vit": ("vit.layers.1.attention.q_proj", "vit.encoder.layer.1.attention.attention.query"),
        "swin": (
            "swin.encoder.layers.1.blocks.0.attention.k_proj",
            "swin.encoder.layers.1.blocks.0.attention.self.key",
        ),
    }[model_type]
    assert gammas[on_disk] == tuple(model.get_submodule(in_memory).gamma.tolist())
    assert len(set(gammas.values())) > 5  # a wrong pairing would show


def test_a_fused_weight_has_a_sigma_per_block(tmp_path):
    trained("gpt2").save_pretrained(tmp_path / "split")
    trained("gpt2", fused_qkv="joint").save_pretrained(tmp_path / "joint")
    name = "transformer.h.0.attn.c_attn"
    split = sigma_by_layer(inspect_checkpoint(tmp_path / "split"))
    joint = sigma_by_layer(inspect_checkpoint(tmp_path / "joint"))
    assert len(split[name]) == 3 and len(joint[name]) == 1


def test_shards_an_index_and_single_files_read_the_same(model_type, tmp_path):
    model = trained(model_type)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    whole = inspect_checkpoint(tmp_path / "whole")
    assert len(shards) > 1
    assert len(list((tmp_path / "sharded").glob("hf_stable_state-*"))) > 1

    def rows(path):
        return sorted(inspect_checkpoint(path).layers, key=lambda layer: layer.name)

    expected = sorted(whole.layers, key=lambda layer: layer.name)
    assert rows(tmp_path / "sharded") == expected
    assert rows(tmp_path / "sharded" / "model.safetensors.index.json") == expected
    assert rows(tmp_path / "whole" / "model.safetensors") == expected
    one = inspect_checkpoint(shards[0])
    assert one.is_healthy and 0 < len(one.layers) < len(expected)
    assert set(one.layers) <= set(expected)


def test_a_raw_state_dict_is_recognised(tmp_path):
    model = trained("vit")
    save_file(model.state_dict(), tmp_path / "raw.safetensors")
    report = inspect_checkpoint(tmp_path)
    layer = next(each for each in report.layers if each.name == "vit.layers.0.mlp.fc1")
    module = model.vit.layers[0].mlp.fc1
    assert report.kind == "raw"
    assert layer.gamma == tuple(module.gamma.tolist())
    exact = torch.linalg.svdvals(module.weight.detach())[0].item()
    assert layer.sigma == pytest.approx((exact,), rel=RTOL)
    assert not any("sigma" in name.name or "gamma" in name.name for name in report.layers)


def test_the_sidecar_itself_can_be_inspected(tmp_path):
    trained("bert").save_pretrained(tmp_path)
    report = inspect_checkpoint(tmp_path / "hf_stable_state.safetensors")
    assert report.kind == "raw" and report.is_healthy and report.layers


def test_a_sidecar_of_another_save_is_a_problem(tmp_path):
    model = trained("gpt2")
    model.save_pretrained(tmp_path / "early")
    assert inspect_checkpoint(tmp_path / "early").is_healthy
    sgd_steps(model)
    model.save_pretrained(tmp_path / "late")
    shutil.copy(tmp_path / "late" / "hf_stable_state.safetensors", tmp_path / "early")
    report = inspect_checkpoint(tmp_path / "early")
    assert not report.is_healthy
    assert "another save" in report.problem and "transformer.h." in report.problem


def test_matrices_that_have_no_sigma_are_shown_with_the_reason(tmp_path):
    save_file(
        {
            "nan.weight": torch.full((4, 4), float("nan")),
            "int.weight": torch.ones(4, 4, dtype=torch.int8),
            "empty.weight": torch.ones(0, 4),
            "half.weight": torch.eye(4, dtype=torch.bfloat16) * 3,
            "norm.weight": torch.ones(4),
        },
        tmp_path / "model.safetensors",
    )
    report = inspect_checkpoint(tmp_path)
    notes = {layer.name: layer.note for layer in report.layers}
    assert "NaN" in notes["nan"] and "floating" in notes["int"] and notes["empty"] == "empty"
    half = next(layer for layer in report.layers if layer.name == "half")
    assert half.dtype == "bfloat16" and half.sigma == (3.0,)
    assert "norm" not in notes
    assert not report.is_healthy
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["ln_1.weight", "ln_1.bias", "mlp.c_fc.bias"])
def test_a_gain_or_bias_that_is_not_finite_is_named(part, value, tmp_path, capsys):
    tiny_model("gpt2").save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == SUCCESS
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"transformer.h.0.{part}"
    tensors[name][0] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    report = inspect_checkpoint(tmp_path)
    assert report.nonfinite == (name,) and not report.is_healthy
    assert report.signs == (f"{name} has NaN or infinite entries",)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == NO
    assert "Not healthy" in (shown := capsys.readouterr().out) and name in shown
    assert main(["inspect", str(tmp_path), "--json"]) == NO
    content = strict_json(capsys.readouterr().out)
    assert content["nonfinite"] == [name] and not content["is_healthy"]
    norms = {norm["name"]: norm["norm"] for norm in content["norms"]}
    assert (norms["transformer.h.0.ln_1"] is None) == (part == "ln_1.weight")
    gain = tensors["transformer.h.1.ln_1.weight"]
    assert norms["transformer.h.1.ln_1"] == pytest.approx(gain.norm().item(), rel=1e-6)


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_spoilt_sidecar_is_named(tmp_path, capsys):
    trained("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "hf_stable_state.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = "transformer.h.0.mlp.c_fc.sigma_u"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata=metadata)
    assert inspect_checkpoint(tmp_path).nonfinite == (name,)
    assert main(["inspect", str(tmp_path), "--json"]) == NO
    assert strict_json(capsys.readouterr().out)["nonfinite"] == [name]


def test_weights_of_eight_bits_are_read(tmp_path):
    weight = torch.eye(4).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, "b.bias": weight[0].clone()}, tmp_path / "model.safetensors")
    report = inspect_checkpoint(tmp_path)
    assert report.layers[0].sigma == (1.0,) and report.is_healthy


def test_an_id_on_the_hub_is_fetched_and_read(hub, tmp_path, capsys):
    tiny_model("vit").save_pretrained(tmp_path / "model")
    published = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.repos["me/vit"] = Repo(None, {"main": published | {"notes.txt": b"not needed"}})
    assert main(["inspect", "me/vit", "--json"]) == SUCCESS
    there = strict_json(capsys.readouterr().out)
    here = inspect_checkpoint(tmp_path / "model").to_dict()
    assert there | {"path": ""} == here | {"path": ""} and there["layers"] and there["blocks"]
    assert main(["inspect", "me/vit", str(tmp_path / "model")]) == SUCCESS
    assert "The weights are the same." in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("notes.txt"))
    assert main(["inspect", "me/other"]) == BAD_INPUT
    assert "the Hub did not give it" in capsys.readouterr().err


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def scramble(path):
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


@pytest.mark.parametrize("damage", [truncate, empty, scramble])
@pytest.mark.parametrize("file", ["model.safetensors", "hf_stable_state.safetensors"])
def test_a_damaged_file_is_named(tmp_path, damage, file):
    trained("bert").save_pretrained(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / file)) + ".*truncated|damaged"):
        inspect_checkpoint(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    truncate(shard)
    with pytest.raises(ValueError, match=re.escape(str(shard))):
        inspect_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(shard))):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}'])
def test_a_damaged_index_is_named(tmp_path, content):
    tiny_model("bert").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(index))):
        inspect_checkpoint(tmp_path)


def test_what_cannot_be_read_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        inspect_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no safetensors weights$"):
        inspect_checkpoint(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin may be a pickle.*save_pretrained"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no safetensors file.*pickle"):
        inspect_checkpoint(tmp_path / "pytorch_model.bin")
    tiny_model("bert").save_pretrained(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="its subfolders do: checkpoint-5"):
        inspect_checkpoint(tmp_path)


@pytest.mark.slow
def test_a_large_file_is_never_whole_in_memory(tmp_path):
    num_tensors = 48  # of 4 MiB each
    file = {f"{i}.weight": torch.randn(64, 2**14) for i in range(num_tensors)}
    save_file(file, tmp_path / "model.safetensors")
    del file

    def resident_memory():
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if "VmRSS" in line)

    seen = []
    inspect_checkpoint(tmp_path, on_layer=lambda done, total: seen.append(resident_memory()))
    assert len(seen) == num_tensors
    # Mapped files count too, up to `MOST_MAPPED`. The first matrix brings libraries and working
    # space with it; the other 47 would add 188 MiB.
    assert max(seen[1:]) - seen[0] < 2 * MOST_MAPPED

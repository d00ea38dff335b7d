"""Plain folders out of patched ones, without building the model."""

import json
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import DEFAULT_HEADS, METHOD, sgd_steps, tiny_batch, tiny_model

import hf_stable
from hf_stable.checkpoints import folding
from hf_stable.checkpoints.folding import fold_checkpoint
from hf_stable.commands.main import main


@pytest.fixture
def model(model_type):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam", init="one").eval()
    sgd_steps(model)
    return model


def logits(model):
    with torch.no_grad():
        return model(**tiny_batch(model)).logits


def load_plain(model, folder):
    cls = getattr(transformers, DEFAULT_HEADS[model.config.model_type])
    plain, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not hf_stable.is_patched(plain)
    return plain.eval()


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_a_saved_folder_is_copied_without_what_only_training_needs(model, tmp_path, max_shard_size):
    source, output = tmp_path / "checkpoint-5", tmp_path / "plain"
    model.save_pretrained(source, max_shard_size=max_shard_size)
    for name in ("optimizer.pt", "trainer_state.json", "rng_state.pth", "training_args.bin"):
        (source / name).write_text("{}")
    (source / "tokenizer.json").write_text("{}")
    report = fold_checkpoint(source, output)
    expected = {file.name for file in source.glob("model*")} | {"config.json", "tokenizer.json"}
    expected |= {file.name for file in source.glob("generation_config.json")}
    assert set(report.files) == expected == {file.name for file in output.iterdir()}
    assert report.num_layers == hf_stable.describe(model).num_patched
    assert (source / "hf_stable_state.safetensors").exists()
    torch.testing.assert_close(logits(load_plain(model, output)), logits(model))


@pytest.mark.parametrize("num_files", [1, 3])
def test_raw_weights_are_folded(model, tmp_path, num_files):
    source, output = tmp_path / "raw", tmp_path / "plain"
    model.config.save_pretrained(source)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k not in tied}
    names = sorted(tensors)
    for number in range(num_files):
        part = {name: tensors[name] for name in names[number::num_files]}
        name = f"model-{number}.safetensors" if num_files > 1 else "model.safetensors"
        save_file(part, source / name, metadata={"format": "pt"})
    report = fold_checkpoint(source, output)
    assert report.num_layers == hf_stable.describe(model).num_patched
    plain = load_plain(model, output)
    torch.testing.assert_close(logits(plain), logits(model))
    raw = load_file(next(source.glob("*.safetensors")))
    assert any(not torch.equal(raw[key], plain.state_dict()[key])
               for key in raw if key in plain.state_dict())  # fmt: skip
    expected = hf_stable.fold(model).state_dict()
    assert all(torch.equal(expected[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("names_class", [True, False])
def test_raw_weights_without_layernorms_are_refused(model_type, names_class, tmp_path):
    """A plain config beside them would bring the norms back."""
    source, output = tmp_path / "raw", tmp_path / "plain"
    model = hf_stable.patch(tiny_model(model_type), ["sigma_reparam", METHOD[model_type]])
    if names_class:
        model.config.architectures = [DEFAULT_HEADS[model_type]]
    model.config.save_pretrained(source)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k not in tied}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="LayerNorms seem to be removed.*hf_stable.export"):
        fold_checkpoint(source, output)
    assert not output.exists()


def test_it_says_that_removed_layernorms_stay_removed(tmp_path, capsys):
    said = "Removed LayerNorms stay removed"
    for name, methods in {"with": [], "without": ["remove_pre_layernorm"]}.items():
        hf_stable.patch(tiny_model("vit"), ["sigma_reparam", *methods]).save_pretrained(
            tmp_path / name
        )
        assert main(["fold", str(tmp_path / name), str(tmp_path / f"{name}-folded")]) == 0
        assert (said in capsys.readouterr().out) == (name == "without")


def test_nothing_is_written_when_it_cannot_be_done(tmp_path):
    model = hf_stable.patch(tiny_model("bert"), "sigma_reparam")
    source, output = tmp_path / "source", tmp_path / "out"
    tiny_model("bert").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="is plain.*nothing to fold"):
        fold_checkpoint(tmp_path / "plain", output)
    model.save_pretrained(source)
    sgd_steps(model)
    model.save_pretrained(tmp_path / "late")
    shutil.copytree(source, tmp_path / "mixed")
    shutil.copy(tmp_path / "late" / "hf_stable_state.safetensors", tmp_path / "mixed")
    with pytest.raises(ValueError, match="another save than the weights beside it"):
        fold_checkpoint(tmp_path / "mixed", output)
    with pytest.raises(ValueError, match="is there already"):
        fold_checkpoint(source, tmp_path / "late")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        fold_checkpoint(source / "model.safetensors", output)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fold_checkpoint(tmp_path / "nowhere", output)
    with pytest.raises(OSError, match="choose a directory that can be written to"):
        fold_checkpoint(source, source / "config.json" / "out")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        fold_checkpoint(source, output)
    assert not output.exists()
    assert not list(tmp_path.glob(".out-*"))


def test_an_empty_output_folder_is_used(tmp_path):
    model = hf_stable.patch(tiny_model("bert"), "sigma_reparam")
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "out").mkdir()
    fold_checkpoint(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def save_shards(model, folder, *, wrapped=False):
    """What accelerate writes of an FSDP model with SHARDED_STATE_DICT: DCP below "model."."""
    names = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if wrapped:  # as activation checkpointing names the blocks
        names = {
            name.replace("h.0.", "h.0._checkpoint_wrapped_module."): t for name, t in names.items()
        }
    path = folder / "pytorch_model_fsdp_0"
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    dcp.save({"model": names}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    return path


@pytest.fixture
def config_folder(model, tmp_path):
    model.config.architectures = [DEFAULT_HEADS[model.config.model_type]]
    model.config.save_pretrained(tmp_path / "config")
    return str(tmp_path / "config")


def test_shards_are_put_together_and_folded(model, config_folder, tmp_path):
    source, output = tmp_path / "checkpoint-5", tmp_path / "plain"
    save_shards(model, source, wrapped=model.config.model_type == "gpt2")
    (source / "trainer_state.json").write_text("{}")
    (source / "optimizer_0").mkdir()
    (source / "tokenizer.json").write_text("{}")
    report = fold_checkpoint(source, output, config_folder)
    assert report.num_layers == hf_stable.describe(model).num_patched
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(report.files)
    assert "trainer_state.json" not in report.files
    plain = load_plain(model, output)
    torch.testing.assert_close(logits(plain), logits(model))
    # It is what saving the model itself would have written, names on disk included.
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    found = load_file(output / "model.safetensors")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    raw = model.state_dict()
    assert any(name in saved and not torch.equal(raw[name], saved[name]) for name in raw) or (
        model.config.model_type in ("vit", "swin")  # other names on disk than in memory
    )


def test_shards_of_a_plain_model_are_put_together(tmp_path):
    model = tiny_model("gpt2")
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path / "config")
    path = save_shards(model, tmp_path / "source")
    report = fold_checkpoint(path, tmp_path / "out", str(tmp_path / "config" / "config.json"))
    assert report.num_layers == 0
    torch.testing.assert_close(logits(load_plain(model, tmp_path / "out")), logits(model.eval()))


def test_shards_that_cannot_be_folded_say_why(tmp_path):
    def config_of(name, **changes):
        model = tiny_model("gpt2", **changes)
        model.config.architectures = [name]
        folder = tmp_path / "-".join([name, *changes])
        model.config.save_pretrained(folder)
        return str(folder)

    good = config_of("GPT2LMHeadModel")
    source, output = tmp_path / "source", tmp_path / "out"
    shards = save_shards(hf_stable.patch(tiny_model("gpt2"), "sigma_reparam"), source)
    for config, said in (
        (None, r"has FSDP's shards and no config.json; give the model's config \(--config\)"),
        (config_of("GPT2ForSequenceClassification"), "another model, a GPT2ForSequenceClass"),
        (
            config_of("NoSuchModel"),
            r"under .architectures., whose first entry is no model",
        ),
        (config_of("GPT2LMHeadModel", n_layer=1), "it has no 'transformer.h.1"),
        (config_of("GPT2LMHeadModel", n_embd=48, n_head=2), "has the shape .* in it and"),
    ):
        with pytest.raises(ValueError, match=said):
            fold_checkpoint(source, output, config)
    with pytest.raises(ValueError, match="it is folded with the config.json in it; leave out"):
        fold_checkpoint(good, output, good)
    without = hf_stable.patch(tiny_model("gpt2"), "remove_pre_layernorm")
    save_shards(without, tmp_path / "without")
    with pytest.raises(ValueError, match="LayerNorms seem to be removed.*hf_stable.export"):
        fold_checkpoint(tmp_path / "without", output, good)
    shard = next(shards.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no whole distributed checkpoint"):
        fold_checkpoint(source, output, good)
    assert not output.exists()


def in_two_folders(model, source):
    """Save raw weights in two files of one name, as an index may name them."""
    model.config.save_pretrained(source)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k not in tied}
    names = sorted(tensors)
    weight_map = {}
    for place, part in (("a", names[::2]), ("b", names[1::2])):
        (source / place).mkdir()
        save_file({name: tensors[name] for name in part}, source / place / "model.safetensors")
        weight_map |= dict.fromkeys(part, f"{place}/model.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, weight_map


@pytest.mark.parametrize("model_type", ["gpt2"])
def test_files_of_one_name_in_two_folders_lose_no_tensor(model, tmp_path):
    source, output = tmp_path / "raw", tmp_path / "plain"
    in_two_folders(model, source)
    fold_checkpoint(source, output)
    torch.testing.assert_close(logits(load_plain(model, output)), logits(model))
    assert len(list(output.glob("model-0000*-of-00002.safetensors"))) == 2


@pytest.mark.parametrize("model_type", ["gpt2"])
def test_an_index_that_leads_out_of_the_folder_is_refused(model, tmp_path):
    source = tmp_path / "raw"
    index, weight_map = in_two_folders(model, source)
    (source / "b").rename(tmp_path / "b")
    there = {k: v.replace("b/", "../b/") for k, v in weight_map.items()}
    index.write_text(json.dumps({"weight_map": there}))
    with pytest.raises(ValueError, match=r"names '\.\./b/model.safetensors', which is not in its"):
        fold_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("model_type", ["gpt2"])
def test_a_tensor_in_two_files_is_refused(model, tmp_path):
    source = tmp_path / "raw"
    in_two_folders(model, source)
    (first, name) = (source / "a" / "model.safetensors", "transformer.wpe.weight")
    both = load_file(first) | {name: torch.zeros(32, 16)}
    save_file(both, first)
    other = source / "b" / "model.safetensors"
    save_file(load_file(other) | {name: torch.ones(32, 16)}, other)
    with pytest.raises(ValueError, match=f"both hold '{name}'"):
        fold_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("model_type", ["gpt2"])
def test_what_was_written_is_compared_with_what_was_read(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(folding.shutil, "copyfile", lambda a, b, **_: save_file({}, b))
    with pytest.raises(ValueError, match="not all came out as they are"):
        fold_checkpoint(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()

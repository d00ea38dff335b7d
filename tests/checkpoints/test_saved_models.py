"""`hf-stable export` and `hf-stable push`: a folder in, a folder or a repository out."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from contract_models import SAME
from exported_cases import patched
from hub_stand_in import assert_published, card_of, files
from safetensors.torch import load_file, save_file
from tiny_models import sgd_steps, tiny_batch, tiny_model, tiny_tokenizer

import hf_stable
from hf_stable.checkpoints.saved_models import export_saved, load_saved
from hf_stable.commands.conventions import BAD_INPUT, SUCCESS
from hf_stable.commands.main import main


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a patched model, a tokenizer, a card, and what only serves to continue."""
    folder = tmp_path / "checkpoint"
    model = patched("vit", "ViTForImageClassification", "sigma_no_norms")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    (folder / "optimizer.pt").write_bytes(b"moments")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7, "log_history": []}))
    return folder, model


def assert_computes(loaded, model, **tolerance):
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        got = loaded.eval()(**batch).logits.to(expected.dtype)
    torch.testing.assert_close(got, expected, **(tolerance or SAME))


def test_a_checkpoint_is_loaded_as_what_it_is(checkpoint, tmp_path):
    folder, model = checkpoint
    loaded = load_saved(folder)
    assert hf_stable.is_patched(loaded)
    hf_stable.export(loaded, tmp_path / "out")
    plain = load_saved(tmp_path / "out")
    assert not hf_stable.is_patched(plain)
    assert_computes(plain, model)


def test_a_folder_that_names_no_class_of_transformers_is_refused(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MyViT"]}))
    with pytest.raises(ValueError, match=r"\['MyViT'\] under 'architectures'"):
        load_saved(tmp_path)


def test_raw_weights_in_a_pickle_are_refused(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam", init="one")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds the raw weights of a patched model"):
        load_saved(tmp_path)
    torch.save(hf_stable.fold(model).state_dict(), tmp_path / "pytorch_model.bin")
    assert_computes(load_saved(tmp_path), model, rtol=0, atol=0)


def test_raw_weights_are_refused_until_they_are_folded(tmp_path, capsys):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam", init="one")
    sgd_steps(model)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "raw")
    save_file(model.state_dict(), tmp_path / "raw" / "model.safetensors", metadata={"format": "pt"})
    raw, folded, out = (str(tmp_path / name) for name in ("raw", "folded", "out"))
    assert main(["export", raw, out]) == BAD_INPUT
    assert f"Run hf-stable fold {raw} OUT first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["fold", raw, folded]) == main(["export", folded, out]) == SUCCESS
    assert_computes(load_saved(out), model)


def test_export_takes_tokenizer_and_card_along_and_nothing_else(checkpoint, tmp_path, capsys):
    folder, model = checkpoint
    out = tmp_path / "out"
    assert main(["export", str(folder), str(out), "--json"]) == SUCCESS
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed["files"]
        == sorted(file.name for file in out.iterdir())
        == [
            "README.md",
            "config.json",
            "model.safetensors",
            "modeling_hf_stable.py",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "# By hand" in card and "optimizer steps: 7" in card
    assert "hf_stable" not in (folder / "README.md").read_text()
    assert_computes(load_saved(out), model)
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == 37


def test_export_casts_and_shards(checkpoint, tmp_path):
    folder, model = checkpoint
    arguments = ["export", str(folder), str(tmp_path / "out"), "--dtype", "bf16"]
    assert main([*arguments, "--max-shard-size", "5KB"]) == SUCCESS
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {t.dtype for shard in shards for t in load_file(shard).values()} == {torch.bfloat16}
    # The same weights, rounded; what is rounded differs from what is not.
    loaded = load_saved(tmp_path / "out").float()
    assert export_saved(folder, tmp_path / "whole")
    rounded = load_saved(tmp_path / "whole")
    with pytest.raises(AssertionError):
        assert_computes(loaded, rounded)
    assert_computes(loaded, rounded.bfloat16().float())


def test_export_onto_the_folder_itself_is_refused(checkpoint, capsys):
    folder, _ = checkpoint
    before = sorted(folder.iterdir())
    assert main(["export", str(folder), f"{folder}/."]) == BAD_INPUT
    assert "could not be continued" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_a_plain_folder_is_exported_with_a_card(tmp_path):
    model = tiny_model("bert").eval()
    model.save_pretrained(tmp_path / "plain")
    names = export_saved(tmp_path / "plain", tmp_path / "out")
    assert names == ("README.md", "config.json", "model.safetensors")
    assert_computes(load_saved(tmp_path / "out"), model, rtol=0, atol=0)


def test_push_uploads_what_export_writes(checkpoint, hub, capsys):
    folder, model = checkpoint
    assert main(["push", str(folder), "me/digits", "--private"]) == SUCCESS
    assert (
        capsys.readouterr().out == f"{hub.endpoint}/me/digits/commit/{hub.repos['me/digits'].sha}\n"
    )
    assert_published(hub, "me/digits", model, with_norms=False)
    assert hub.repos["me/digits"].visibility == "private"
    assert {"tokenizer.json", "README.md"} <= set(files(hub, "me/digits"))
    assert not {"optimizer.pt", "trainer_state.json"} & set(files(hub, "me/digits"))
    assert "# By hand" in card_of(hub, "me/digits").text


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize(
    ("command", "label"),
    [("inspect", "Reading"), ("fold", "Folding"), ("export", "Exporting"), ("push", "Uploading")],
)
def test_long_work_shows_a_bar_on_a_terminal_alone(
    command, label, is_terminal, checkpoint, hub, tmp_path, capsys, monkeypatch
):
    targets = {"inspect": [], "push": ["me/digits"]}.get(command, [str(tmp_path / "out")])
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if is_terminal else "0")
    assert main([command, str(checkpoint[0]), *targets]) == SUCCESS
    printed = capsys.readouterr()
    assert (label in printed.err) is is_terminal and label not in printed.out


def test_a_push_that_the_hub_refuses_is_one_line(checkpoint, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(checkpoint[0]), "me/digits"]) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hf-stable: error: ") and "401" in line

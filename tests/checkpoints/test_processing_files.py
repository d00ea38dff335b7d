"""What goes along with a model when it is folded, exported or pushed, and what never does."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from tiny_models import tiny_model, tiny_tokenizer

import hf_stable
from hf_stable.checkpoints.folding import fold_checkpoint
from hf_stable.checkpoints.processing_files import PROCESSING_FILES
from hf_stable.checkpoints.saved_models import export_saved, list_published
from hf_stable.commands.conventions import SUCCESS
from hf_stable.commands.main import main

PRIVATE = (
    ".env", "hf_token.json", "credentials_token.json", "vocab.secret", "id_rsa", "notes.txt",
    "chat_template_private_notes.txt", "my_processor_config.json", "train.py", "optimizer.pt",
    "model.ckpt", "state.pickle", "weights.joblib", "training_args.bin", "processor_config.json~",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    hf_stable.patch(tiny_model("gpt2"), "sigma_reparam").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates" / "token.txt").write_text("SECRET")
    for name in PRIVATE:
        (folder / name).write_text("SECRET")
    return folder


def all_files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


TAKEN = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "additional_chat_templates/rag.jinja",
}  # fmt: skip


@pytest.mark.parametrize("way", [fold_checkpoint, export_saved])
def test_known_names_go_along_and_no_others(way, folder, tmp_path):
    out = tmp_path / "out"
    way(folder, out)
    assert all_files(out) == TAKEN
    assert not any(b"SECRET" in (out / name).read_bytes() for name in TAKEN)


def test_known_names_are_what_processors_write(folder):
    written = {path.name for path in folder.glob("token*")}
    assert len(written) > 1 and written <= PROCESSING_FILES
    assert not PROCESSING_FILES & set(PRIVATE)


@pytest.mark.parametrize("way", [fold_checkpoint, export_saved])
@pytest.mark.parametrize("name", ["vocab.txt", "README.md", "tokenizer.json"])
def test_links_are_not_followed(name, way, folder, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("SECRET")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=rf"{name} is a link to .*id_rsa: links are not followed"):
        way(folder, tmp_path / "out")
    assert not any(b"SECRET" in path.read_bytes() for path in (tmp_path / "out").rglob("*.*"))


def test_a_linked_folder_of_templates_is_not_followed(folder, tmp_path):
    shutil.rmtree(folder / "additional_chat_templates")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "secret.jinja").write_text("SECRET")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="is a link to"):
        export_saved(folder, tmp_path / "out")


def test_what_is_no_file_is_refused_and_not_waited_for(folder, tmp_path):
    os.mkfifo(folder / "vocab.txt")
    with pytest.raises(ValueError, match=r"vocab\.txt is no file"):
        fold_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["export", "OUT"], ["push", "me/model"]])
def test_a_dry_run_lists_what_would_go_and_does_nothing(command, folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [command[0], str(folder), command[1].replace("OUT", str(out)), "--dry-run"]
    assert main([*arguments, "--json"]) == SUCCESS
    listed = json.loads(capsys.readouterr().out)["files"]
    assert main(arguments) == SUCCESS
    shown = capsys.readouterr().out
    assert not out.exists() and listed == list_published(folder)
    export_saved(folder, out)
    assert set(listed) == all_files(out) == TAKEN
    assert listed["model.safetensors"] == (out / "model.safetensors").stat().st_size
    assert all(name in shown for name in TAKEN)

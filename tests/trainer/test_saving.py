"""What transformers and the Trainer publish of a patched model."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import transformers
from tiny_models import tiny_model
from tiny_training import dropout_model, make_trainer
from transformers import Trainer

import hf_stable
from hf_stable._file_names import SIDECAR_FILE

try:
    import peft
except ImportError:  # the oldest versions are tested without it
    peft = None


# Publishing


class Hub:
    """Stands in for the Hub: remembers which files of a folder were there to be uploaded."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.repo_id = "me/model"

    def create_repo(self, *args, **kwargs):
        return self

    def create_commit(self, repo_id, operations, **kwargs):
        self.files = {operation.path_in_repo for operation in operations}
        return self

    def upload_folder(self, folder_path, **kwargs):
        self.files = set(os.listdir(folder_path))
        return self


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    card = SimpleNamespace(save=lambda path: None)
    for module in (transformers.utils.hub, transformers.modeling_utils, transformers.trainer):
        monkeypatch.setattr(module, "hf_api", lambda *args, **kwargs: hub)
    for module in (transformers.utils.hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: card)
    return hub


def test_saving_with_push_uploads_no_sidecar(hub, tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert "model.safetensors" in hub.files and SIDECAR_FILE not in hub.files
    assert (tmp_path / "model" / SIDECAR_FILE).is_file()
    hub.files.clear()
    model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert SIDECAR_FILE not in hub.files


def test_pushing_a_model_uploads_no_sidecar(hub):
    hf_stable.patch(tiny_model("vit"), "sigma_reparam").push_to_hub("me/model")
    assert "model.safetensors" in hub.files and SIDECAR_FILE not in hub.files


def test_pushing_from_the_trainer_uploads_no_sidecar(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "create_model_card", lambda *args, **kwargs: None)
    model = hf_stable.patch(dropout_model("vit"), "sigma_reparam")
    trainer = make_trainer(model, tmp_path, save_steps=2, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / SIDECAR_FILE).is_file()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files and SIDECAR_FILE not in hub.files
    assert (tmp_path / "checkpoint-2" / SIDECAR_FILE).is_file()

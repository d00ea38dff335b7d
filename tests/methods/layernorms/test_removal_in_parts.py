"""Norms of a part: what no folder could be loaded as is refused before anything changes."""

from __future__ import annotations

import pytest
import torch
from held_models import held_model
from tiny_models import tiny_config, tiny_model
from transformers import (
    BertForMaskedLM,
    BertModel,
    BertPreTrainedModel,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    VisionEncoderDecoderModel,
    ViTModel,
)

import hf_stable
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.methods.layernorms.removal import removed_norms

REFUSED = r"a VisionEncoderDecoderModel without norms could not be saved.*Keep its norms"
METHODS = ["remove_pre_layernorm", "sigma_reparam"]


class OwnModel(BertPreTrainedModel):
    """A model of a user's own, of a class that transformers does not have."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.post_init()


def decoder():
    return GPT2LMHeadModel(tiny_config("gpt2", add_cross_attention=True, is_decoder=True))


def composite(encoder=None):
    torch.manual_seed(0)
    encoder = ViTModel(tiny_config("vit")) if encoder is None else encoder
    return VisionEncoderDecoderModel(encoder=encoder, decoder=decoder())


def test_a_part_of_a_composite_keeps_its_norms():
    model = composite()
    with pytest.raises(UnsupportedModelError, match=REFUSED):
        hf_stable.patch(model.encoder, METHODS)
    assert not removed_norms(model) and not hf_stable.is_patched(model)
    hf_stable.patch(model.encoder, "sigma_reparam")  # this can be saved
    assert hf_stable.is_patched(model)


def test_a_part_of_an_own_model_keeps_its_norms():
    model = OwnModel(tiny_config("bert"))
    with pytest.raises(UnsupportedModelError, match="OwnModel is no model class of transformers"):
        hf_stable.patch(model.bert, "remove_layernorm")
    assert not removed_norms(model)


def test_a_part_that_lost_them_before_is_refused_when_training_begins(tmp_path):
    encoder = hf_stable.patch(ViTModel(tiny_config("vit")), METHODS)
    model = composite(encoder)
    args = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    trainer = Trainer(model, args, train_dataset=[{"pixel_values": torch.zeros(1, 8, 8)}])
    with pytest.raises(UnsupportedModelError, match=REFUSED):
        trainer.train()
    assert trainer.optimizer is None
    with pytest.raises(UnsupportedModelError, match=REFUSED):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_can_be_loaded_is_not_refused(tmp_path):
    alone = hf_stable.patch(ViTModel(tiny_config("vit")), METHODS)
    assert removed_norms(alone)
    whole = tiny_model("bert")
    hf_stable.patch(whole.bert, "remove_layernorm")
    whole.save_pretrained(tmp_path)
    loaded = hf_stable.load(BertForMaskedLM, tmp_path)
    assert len(removed_norms(whole)) == 4 and not [
        name for name in loaded.state_dict() if "output.LayerNorm" in name
    ]
    held = held_model("remove_layernorm")  # its checkpoints are resumed; it has no folder to load
    assert removed_norms(held)

"""Gemma 3 with images, LLaVA and Mask2Former's Swin: whole models of parts that have entries."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from attention_references import ENTROPY, attention_maps
from contract_models import OTHER, SAME

import hf_stable

TEXT = dict(
    vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64, head_dim=4,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
IMAGE = dict(
    image_size=8, patch_size=4, num_channels=3, hidden_size=16, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=32,
)  # fmt: skip
SWIN = dict(
    image_size=32, patch_size=2, num_channels=3, embed_dim=8, depths=[1, 1, 1, 1],
    num_heads=[1, 1, 2, 2], window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"],
)  # fmt: skip


def gemma3():
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=IMAGE, mm_tokens_per_image=4, image_token_id=36,
        boi_token_id=34, eoi_token_id=35,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration, config


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(projection_dim=8, **IMAGE),
        image_token_id=36, vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration, config


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN), feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=24, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, dim_feedforward=24, num_queries=5, num_labels=3,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation, config


MODELS = {
    "gemma3": (gemma3, "logits", ("model.vision_tower", "model.language_model")),
    "llava": (llava, "logits", ("model.vision_tower", "model.language_model")),
    "mask2former": (mask2former, "masks_queries_logits", ("model.pixel_level_module.encoder",)),
}


@pytest.fixture(params=MODELS)
def made(request):
    return MODELS[request.param]


def built(made):
    torch.manual_seed(0)
    model_class, config = made[0]()
    return model_class(config).eval()


def inputs_of(model):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, transformers.Mask2FormerForUniversalSegmentation):
        return {"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}
    ids = torch.randint(3, 34, (2, 8), generator=generator)
    ids[:, 1:5] = 36
    images = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "input_ids": ids}
    if isinstance(model, transformers.Gemma3ForConditionalGeneration):
        images["token_type_ids"] = (ids == 36).long()
    return images


def output(model, made):
    return model(**inputs_of(model))[made[1]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* matrices are patched:UserWarning")
def test_the_whole_is_patched_trained_saved_and_loaded(made, tmp_path):
    model = built(made)
    with torch.no_grad():
        expected = output(model, made)
    hf_stable.patch(model, "sigma_reparam")
    with torch.no_grad():
        assert torch.equal(output(model, made), expected)
    rows = hf_stable.describe(model).layers
    for part in made[2]:
        own = [row for row in rows if row.name.startswith(part)]
        assert own and all(row.skipped is None for row in own), part

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(2):
        optimizer.zero_grad()
        output(model.train(), made).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        answer = output(model.eval(), made)
    assert not torch.allclose(answer, expected, **OTHER)
    model.save_pretrained(tmp_path)
    stock, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = hf_stable.load(type(model), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(output(stock.eval(), made), answer, **SAME)
        assert torch.equal(output(again.eval(), made), answer)


def test_every_attention_of_the_parts_is_measured(made):
    model = built(made)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # of attention that is torch's own
        with hf_stable.probe(model) as records:
            output(model, made)
    maps = attention_maps(built(made), inputs_of(model))
    for part in made[2]:
        assert any(layer.startswith(part) for layer in records.entropy), part
    described = {layer for layer in records.entropy if layer in maps}
    assert described == set(maps)
    for layer, (own,) in maps.items():
        exact = torch.special.entr(own).sum(-1).mean((0, 2))
        torch.testing.assert_close(records.entropy[layer], exact, **ENTROPY)

"""Registering architectures of one's own: a few lines, and everything works from end to end."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassification, LlamaConfig, LlamaForCausalLM

import hf_stable
from hf_stable import Architecture, Attention, Block, Member
from hf_stable.architectures import finding, registry
from hf_stable.methods.sigma_reparam.layers import SigmaLayer

LLAMA = Architecture(
    model_type="llama",
    block=Block(
        class_name="LlamaDecoderLayer",
        attentions=(
            Attention(
                module="self_attn",
                query="self_attn.q_proj",
                key="self_attn.k_proj",
                value="self_attn.v_proj",
                output="self_attn.o_proj",
            ),
        ),
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out=("mlp.down_proj",),
        pre_norms=("input_layernorm", "post_attention_layernorm"),
    ),
    heads=(Member("LlamaForCausalLM", "lm_head"),),
    norms=(Member("LlamaModel", "norm"),),
)


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    ids = torch.randint(0, 37, (4, 12))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def tiny_deit():
    torch.manual_seed(0)
    config = DeiTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, num_labels=3, hidden_dropout_prob=0.0,
    )  # fmt: skip
    pixels, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    return DeiTForImageClassification(config), {"pixel_values": pixels, "labels": labels}


def deit_architecture():
    """DeiT is ViT by another name, so its entry is ViT's with the names replaced."""
    vit = registry.architecture_of(
        transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=0))
    )

    def rename(members):
        return tuple(Member(m.class_name.replace("ViT", "DeiT"), m.path) for m in members)

    return Architecture(
        model_type="deit",
        block=dataclasses.replace(vit.block, class_name="DeiTLayer"),
        layers=rename(vit.layers),
        heads=rename(vit.heads),
        norms=rename(vit.norms),
    )


CASES = {"llama": (tiny_llama, lambda: LLAMA, 14), "deit": (tiny_deit, deit_architecture, 13)}


@pytest.fixture(autouse=True)
def only_four(monkeypatch):
    """A registry of which the entries of these tests are not a part yet."""
    four = {name: registry._registry[name] for name in ("bert", "gpt2", "swin", "vit")}
    monkeypatch.setattr(registry, "_registry", four)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    build, architecture, num_layers = request.param
    return *build(), architecture(), num_layers


def train(model, batch, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_an_unregistered_model_is_refused_with_the_way_out(case):
    model, _, architecture, _ = case
    with pytest.raises(
        hf_stable.UnsupportedModelError,
        match=rf"no hf_stable architecture for model_type '{architecture.model_type}' "
        r"\(supported: bert, gpt2, swin, vit\); describe it in a few lines with "
        "hf_stable.register_architecture",
    ):
        hf_stable.patch(model, "sigma_reparam")


def test_a_registered_model_works_from_patch_to_fold(case, tmp_path):
    model, batch, architecture, num_layers = case
    plain = copy.deepcopy(model)
    hf_stable.register_architecture(architecture)
    assert architecture.model_type in hf_stable.supported_architectures()
    before = model(**batch).loss.item()
    hf_stable.patch(model, "sigma_reparam")
    assert model(**batch).loss.item() == before
    report = hf_stable.describe(model)
    assert report.num_patched == num_layers
    assert sum(isinstance(module, SigmaLayer) for module in model.modules()) == num_layers

    sigmas = [row.sigma for row in report.layers]
    losses = train(model, batch)
    assert losses[0] == before and losses[-1] < before
    assert sigmas != [row.sigma for row in hf_stable.describe(model).layers]

    trained = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    hf_stable.fold(model)
    torch.testing.assert_close(model(**batch).logits, trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain.eval()(**batch).logits, trained, rtol=1e-2, atol=1e-3)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == plain.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(loaded(**batch).logits, trained, rtol=1e-4, atol=1e-5)


def test_every_matrix_of_llama_has_its_role():
    hf_stable.register_architecture(LLAMA)
    model, _ = tiny_llama()
    roles = {f.name.split(".", 3)[-1]: f.roles for f in finding.find_layers(model)}
    assert roles["mlp.gate_proj"] == roles["mlp.up_proj"] == ("mlp_in",)
    assert roles["mlp.down_proj"] == ("mlp_out",) and roles["lm_head"] == ("head",)
    norms = {norm.name: norm.placement for norm in finding.find_norms(model)}
    assert norms["model.layers.1.input_layernorm"] == "pre" and norms["model.norm"] == "other"


def test_a_duplicate_is_refused_unless_it_is_to_overwrite():
    hf_stable.register_architecture(LLAMA)
    fewer = dataclasses.replace(LLAMA, block=dataclasses.replace(LLAMA.block, mlp_in=()))
    with pytest.raises(ValueError, match="'llama' is registered already; pass overwrite=True"):
        hf_stable.register_architecture(fewer)
    model, _ = tiny_llama()
    assert registry.architecture_of(model) is LLAMA
    hf_stable.register_architecture(fewer, overwrite=True)
    assert registry.architecture_of(model) is fewer
    assert hf_stable.describe(hf_stable.patch(model, "sigma_reparam")).num_patched == 10


def test_an_entry_that_does_not_fit_the_model_is_refused():
    block = dataclasses.replace(LLAMA.block, mlp_out=("mlp.fc2",))
    hf_stable.register_architecture(dataclasses.replace(LLAMA, block=block))
    model, _ = tiny_llama()
    before = dict(model.named_modules())
    with pytest.raises(
        hf_stable.UnsupportedModelError,
        match=r"the entry for 'llama' names 'model.layers.0.mlp.fc2', which this LlamaDecoderLayer "
        r"does not have; register an entry that fits .*overwrite=True",
    ):
        hf_stable.patch(model, "sigma_reparam")
    assert dict(model.named_modules()) == before


def test_a_block_class_that_the_model_does_not_have_is_refused():
    misspelt = dataclasses.replace(LLAMA.block, class_name="LlamaDecodrLayer")
    hf_stable.register_architecture(dataclasses.replace(LLAMA, block=misspelt))
    model, _ = tiny_llama()
    before = dict(model.named_modules())
    for call in (
        lambda: hf_stable.patch(model, "sigma_reparam"),
        lambda: hf_stable.describe(model),
    ):
        with pytest.raises(
            hf_stable.UnsupportedModelError,
            match=r"the entry for 'llama' names the block class 'LlamaDecodrLayer', which this "
            r"LlamaForCausalLM does not have \(did you mean 'LlamaDecoderLayer'\?\).*overwrite=",
        ):
            call()
    assert dict(model.named_modules()) == before


def test_a_model_without_blocks_keeps_its_other_layers():
    config = transformers.ViTConfig(num_hidden_layers=0, image_size=8, patch_size=4)
    model = hf_stable.patch(transformers.ViTForImageClassification(config), "sigma_reparam")
    assert finding.find_blocks(model) == []
    assert hf_stable.describe(model).num_patched == 1


def test_what_is_registered_has_to_be_an_architecture():
    with pytest.raises(TypeError, match=r"takes an hf_stable\.Architecture, got 'llama'"):
        hf_stable.register_architecture("llama")
    assert "llama" not in hf_stable.supported_architectures()


def test_entries_are_frozen_data():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LLAMA.model_type = "mine"
    assert hash(LLAMA) == hash(dataclasses.replace(LLAMA))


def test_supported_architectures_are_sorted():
    hf_stable.register_architecture(LLAMA)
    assert hf_stable.supported_architectures() == ["bert", "gpt2", "llama", "swin", "vit"]


def test_a_model_that_is_none_of_transformers_is_refused():
    with pytest.raises(
        hf_stable.UnsupportedModelError, match="Sequential has no config.model_type.*pass a"
    ):
        hf_stable.patch(nn.Sequential(nn.Linear(3, 3)), "sigma_reparam")

"""Entries that do not fit their model are refused, by name; what does not hold is not reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_architectures import MODELS, batch, build, outputs_of
from torch import nn

import hf_stable
from hf_stable import Architecture, Attention, Block
from hf_stable.architectures import registry
from hf_stable.architectures.finding import find_blocks, find_layers
from hf_stable.architectures.heads import count_heads
from hf_stable.measures.parts import Parts

pytestmark = pytest.mark.usefixtures("own_registry")


def reregister(model_type, **changes):
    entry = replace(registry._registry[model_type], **changes)
    hf_stable.register_architecture(entry, overwrite=True)


def test_an_attention_path_that_is_not_there_is_an_error_that_names_it():
    old = Attention(
        "attention.attention", "attention.attention.query", "attention.attention.key",
        "attention.attention.value", "attention.output.dense",
    )  # fmt: skip
    block = Block("Dinov2Layer", (old,), ("mlp.fc1",), ("mlp.fc2",), pre_norms=("norm1", "norm2"))
    reregister("dinov2", block=block)
    with pytest.raises(
        hf_stable.UnsupportedModelError,
        match=r"'dinov2.encoder.layer.0.attention.attention', which this Dinov2Layer does not",
    ):
        hf_stable.patch(build("dinov2"), "sigma_reparam")


@pytest.mark.parametrize(
    ("method", "field"),
    [("sigma_reparam", "norms"), ("remove_pre_layernorm", "heads")],
)
def test_a_path_that_another_method_or_describe_asks_for_is_refused_by_every_patch(method, field):
    reregister("llama", **{field: (hf_stable.Member("LlamaForCausalLM", "nrm"),)})
    model = build("llama")
    with pytest.raises(hf_stable.UnsupportedModelError, match="names 'nrm', which this Llama"):
        hf_stable.patch(model, method)
    assert not hf_stable.is_patched(model)


def test_only_cross_attention_may_be_absent():
    encoder, decoder = registry._registry["bart"].blocks
    both = replace(encoder, attentions=decoder.attentions)
    reregister("bart", block=(both, decoder))
    assert len(find_blocks(build("bart"))) == 4
    spoilt = [replace(each, is_cross=False) for each in decoder.attentions]
    reregister("bart", block=(replace(encoder, attentions=tuple(spoilt)), decoder))
    with pytest.raises(hf_stable.UnsupportedModelError, match="names 'model.encoder.layers.0.enc"):
        find_blocks(build("bart"))


@pytest.mark.parametrize("name", ["bart", "wav2vec2, pre-LN", "vit_mae"])
def test_an_entry_that_finds_some_blocks_but_not_all_is_refused(name):
    model = build(name)
    kinds = {
        "bart": ("bart", registry._registry["bart"].blocks[:1]),
        "wav2vec2, pre-LN": ("wav2vec2", registry._registry["wav2vec2"].blocks[:1]),
        "vit_mae": ("vit_mae", replace(registry._registry["vit_mae"].blocks[0],
                                       class_name="ViTMAEDecoder", attentions=(), pre_norms=(),
                                       mlp_in=("decoder_embed",), mlp_out=("decoder_pred",))),
    }  # fmt: skip
    model_type, block = kinds[name]
    reregister(model_type, block=block)
    with pytest.raises(hf_stable.UnsupportedModelError, match="that it leaves out: only a part of"):
        hf_stable.patch(model, "sigma_reparam")


def test_versions_that_an_entry_does_not_fit_are_said():
    reregister("llama", transformers=">=99")
    assert "llama" not in hf_stable.supported_architectures()
    with pytest.raises(hf_stable.UnsupportedModelError, match="fits transformers >=99, and"):
        hf_stable.patch(build("llama"), "sigma_reparam")
    with pytest.raises(ValueError, match="says no versions"):
        reregister("llama", transformers="new ones")


def test_heads_are_counted_by_fallbacks_or_asked_for():
    (block, *_) = find_blocks(build("llama"))
    ((_, attention),) = block.attentions()
    assert count_heads(block.module, attention) == 4  # from the config of the attention
    block.module.self_attn.config = None
    with pytest.raises(hf_stable.UnsupportedModelError, match=r"Attention\(num_heads=...\)"):
        count_heads(block.module, attention)


PARTS = {
    "phi3": ("qkv_proj", Parts((2, 1, 1))),
    "gpt_neox": ("query_key_value", Parts((1, 1, 1), repeats=4)),
    "falcon": ("query_key_value", Parts((4, 1, 1))),
    "modernbert": ("Wi", Parts((1, 1))),
    "mixtral": ("gate_up_proj", Parts((1, 1), stacked=True)),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_where_the_model_has_them(name):
    path, parts = PARTS[name]
    found = {layer.parts for layer in find_layers(build(name)) if layer.name.endswith(path)}
    assert found == {parts}


def test_gains_of_gemma_are_one_plus_weight():
    model = build("gemma")
    with hf_stable.probe(model, terms=["norm_gamma1"]) as records:
        outputs_of(model, batch("gemma"))
    weight = model.model.layers[0].input_layernorm.weight.detach()
    expected = torch.linalg.vector_norm(1 + weight)
    torch.testing.assert_close(records.norm_gamma1["model.layers.0"], expected)
    assert (expected - torch.linalg.vector_norm(weight)).abs() > 1


def test_a_query_of_one_head_grows_in_its_own_spectrum():
    """Of the interleaved GPT-NeoX it is the first of three pieces of the first head."""
    for name in ("gpt_neox", "phi3"):
        sizes = []
        for factor in (1.0, 100.0):
            model = build(name)
            for path, layer in model.named_modules():
                if path.endswith(PARTS[name][0]):
                    layer.weight.data[:4] *= factor
            with hf_stable.probe(model, terms=["sigma_qk"]) as records:
                outputs_of(model, batch(name))
            sizes.append(next(iter(records.sigma_qk.values())))
        grown = sizes[1] / sizes[0]
        torch.testing.assert_close(grown, torch.tensor([100.0, 1, 1, 1]), rtol=1e-3, atol=1e-3)


def test_a_matrix_that_no_entry_names_is_listed():
    model = build("llama")
    model.extra = nn.Linear(16, 3)
    report = hf_stable.describe(hf_stable.patch(model, "sigma_reparam"))
    assert [(each.name, each.shape) for each in report.uncovered] == [("extra", (3, 16))]
    assert "1 more matrices, which no method touches" in str(report)
    assert "the entry for 'llama' does not name it" in str(report)
    assert not hf_stable.describe(build("llama")).uncovered and "mixtral" in MODELS
    assert "router" in str(hf_stable.describe(build("mixtral")))


def test_a_block_has_to_be_one():
    with pytest.raises(TypeError, match="give an hf_stable.Block, or a tuple of them"):
        hf_stable.register_architecture(Architecture("mine", block=("LlamaDecoderLayer",)))


def test_a_parameter_that_is_empty_by_design_is_no_partition_of_another():
    model = build("dinov3_vit, gated")  # without register tokens
    assert [name for name, p in model.named_parameters() if not p.numel()]
    report = hf_stable.describe(hf_stable.patch(model, "sigma_reparam"))
    assert report.num_patched == len(report.layers)

"""What every head class of every architecture owes to every method; names pinned, one by one."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from tiny_models import MODEL_TYPES, tiny_config, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_stable
from hf_stable.architectures.finding import find_blocks, find_layers, find_norms
from hf_stable.methods.patching import METHODS
from hf_stable.methods.sigma_reparam.layers import SigmaLayer

LINEAR_TYPES = (nn.Linear, Conv1D, nn.Conv2d)

QKV = ("query", "key", "value")
GPT2_BLOCK = {
    "attn.c_attn": QKV,
    "attn.c_proj": ("output",),
    "mlp.c_fc": ("mlp_in",),
    "mlp.c_proj": ("mlp_out",),
}
GPT2_CROSS = {
    "crossattention.c_attn": ("key", "value"),
    "crossattention.q_attn": ("query",),
    "crossattention.c_proj": ("output",),
}
GPT2_NORMS = {"ln_1": "pre", "ln_2": "pre"}
VIT_BLOCK = {
    "attention.q_proj": ("query",),
    "attention.k_proj": ("key",),
    "attention.v_proj": ("value",),
    "attention.o_proj": ("output",),
    "mlp.fc1": ("mlp_in",),
    "mlp.fc2": ("mlp_out",),
}
VIT_NORMS = {"layernorm_before": "pre", "layernorm_after": "pre"}
BERT_ATTENTION = {
    "attention.self.query": ("query",),
    "attention.self.key": ("key",),
    "attention.self.value": ("value",),
    "attention.output.dense": ("output",),
}
BERT_MLP = {"intermediate.dense": ("mlp_in",), "output.dense": ("mlp_out",)}
BERT_CROSS = {name.replace("attention", "crossattention", 1): role
              for name, role in BERT_ATTENTION.items()}  # fmt: skip
BERT_NORMS = {"attention.output.LayerNorm": "post", "output.LayerNorm": "post"}


@dataclass(frozen=True)
class Head:
    """A head class with everything that its architecture must find in it.

    `body` prefixes the names of the blocks' model; `layers` and `norms` stand outside the blocks;
    of the `heads`, those that map to False are tied to an embedding.
    """

    model_type: str
    name: str
    body: str = ""
    layers: tuple[str, ...] = ()
    heads: dict[str, bool] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    block: dict[str, tuple[str, ...]] = field(default_factory=dict)
    block_norms: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, object] = field(default_factory=dict)
    inputs: str = "plain"

    def build(self):
        return tiny_model(self.model_type, self.name, **self.overrides)

    def block_names(self):
        if self.model_type == "gpt2":
            paths = ["h.0", "h.1"]
        elif self.model_type == "vit":
            paths = ["layers.0", "layers.1"]
        elif self.model_type == "bert":
            paths = ["encoder.layer.0", "encoder.layer.1"]
        else:
            paths = [f"encoder.layers.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]
        return [self.body + path for path in paths]

    def roles(self):
        """Roles of every layer by its name."""
        inside = {f"{b}.{n}": r for b in self.block_names() for n, r in self.block.items()}
        outside = {self.body + name if name[0] != "/" else name[1:]: ("other",)
                   for name in self.layers}  # fmt: skip
        return inside | outside | {name: ("head",) for name in self.heads}

    def placements(self):
        """Placement of every norm by its name."""
        inside = {f"{b}.{n}": p for b in self.block_names() for n, p in self.block_norms.items()}
        outside = {self.body + name if name[0] != "/" else name[1:]: "other"
                   for name in self.norms}  # fmt: skip
        return inside | outside


def gpt2(name, heads=(), body="transformer.", cross=False, **kwargs):
    block = {**GPT2_BLOCK, **(GPT2_CROSS if cross else {})}
    norms = {**GPT2_NORMS, **({"ln_cross_attn": "pre"} if cross else {})}
    return Head("gpt2", name, body, (), dict(heads), ("ln_f",), block, norms, **kwargs)


def vit(name, heads=(), body="vit.", layers=(), **kwargs):
    layers = ("embeddings.patch_embeddings.projection", *layers)
    return Head("vit", name, body, layers, dict(heads), ("layernorm",), VIT_BLOCK, VIT_NORMS,
                **kwargs)  # fmt: skip


def swin(name, heads=(), body="swin.", **kwargs):
    layers = ("embeddings.patch_embeddings.projection", "encoder.layers.0.downsample.reduction")
    norms = ("embeddings.norm", "encoder.layers.0.downsample.norm", "layernorm")
    return Head("swin", name, body, layers, dict(heads), norms, VIT_BLOCK, VIT_NORMS, **kwargs)


def bert(name, heads=(), body="bert.", pooler=False, transform=False, cross=False, **kwargs):
    layers = ("pooler.dense",) * pooler + ("/cls.predictions.transform.dense",) * transform
    norms = ("embeddings.LayerNorm",) + ("/cls.predictions.transform.LayerNorm",) * transform
    block = {**BERT_ATTENTION, **(BERT_CROSS if cross else {}), **BERT_MLP}
    block_norms = {**BERT_NORMS, **({"crossattention.output.LayerNorm": "post"} if cross else {})}
    return Head("bert", name, body, layers, dict(heads), norms, block, block_norms, **kwargs)


UNTIED = {"tie_word_embeddings": False}
CROSS = {"add_cross_attention": True}

HEADS = {
    "GPT2Model": gpt2("GPT2Model", body=""),
    "GPT2Model, cross-attention": gpt2(
        "GPT2Model", body="", cross=True, overrides=CROSS, inputs="cross"
    ),
    "GPT2LMHeadModel": gpt2("GPT2LMHeadModel", {"lm_head": False}),
    "GPT2LMHeadModel, untied": gpt2("GPT2LMHeadModel", {"lm_head": True}, overrides=UNTIED),
    "GPT2LMHeadModel, cross-attention": gpt2(
        "GPT2LMHeadModel", {"lm_head": False}, cross=True, overrides=CROSS, inputs="cross"
    ),
    "GPT2DoubleHeadsModel": gpt2(
        "GPT2DoubleHeadsModel",
        {"lm_head": False, "multiple_choice_head.summary": True},
        inputs="choices",
        overrides={"summary_first_dropout": 0.0},
    ),
    "GPT2ForSequenceClassification": gpt2("GPT2ForSequenceClassification", {"score": True}),
    "GPT2ForTokenClassification": gpt2(
        "GPT2ForTokenClassification", {"classifier": True}, overrides={"classifier_dropout": 0.0}
    ),
    "GPT2ForQuestionAnswering": gpt2("GPT2ForQuestionAnswering", {"qa_outputs": True}),
    "ViTModel": vit("ViTModel", body="", layers=("pooler.dense",)),
    "ViTForImageClassification": vit("ViTForImageClassification", {"classifier": True}),
    "ViTForImageClassification, no labels": vit(
        "ViTForImageClassification", overrides={"num_labels": 0}
    ),
    "ViTForMaskedImageModeling": vit("ViTForMaskedImageModeling", {"decoder.0": True}),
    "SwinModel": swin("SwinModel", body=""),
    "SwinForImageClassification": swin("SwinForImageClassification", {"classifier": True}),
    "SwinForMaskedImageModeling": swin("SwinForMaskedImageModeling", {"decoder.0": True}),
    "SwinBackbone": swin("SwinBackbone", overrides={"out_features": ["stage1", "stage2"]}),
    "BertModel": bert("BertModel", body="", pooler=True),
    "BertForPreTraining": bert(
        "BertForPreTraining",
        {"cls.predictions.decoder": False, "cls.seq_relationship": True},
        pooler=True,
        transform=True,
    ),
    "BertLMHeadModel": bert(
        "BertLMHeadModel", {"cls.predictions.decoder": False}, transform=True,
        overrides={"is_decoder": True},
    ),
    "BertLMHeadModel, cross-attention": bert(
        "BertLMHeadModel", {"cls.predictions.decoder": False}, transform=True, cross=True,
        overrides={"is_decoder": True, **CROSS}, inputs="cross",
    ),
    "BertForMaskedLM": bert("BertForMaskedLM", {"cls.predictions.decoder": False}, transform=True),
    "BertForMaskedLM, untied": bert(
        "BertForMaskedLM", {"cls.predictions.decoder": True}, transform=True, overrides=UNTIED
    ),
    "BertForNextSentencePrediction": bert(
        "BertForNextSentencePrediction", {"cls.seq_relationship": True}, pooler=True
    ),
    "BertForSequenceClassification": bert(
        "BertForSequenceClassification", {"classifier": True}, pooler=True
    ),
    "BertForMultipleChoice": bert(
        "BertForMultipleChoice", {"classifier": True}, pooler=True, inputs="choices"
    ),
    "BertForTokenClassification": bert("BertForTokenClassification", {"classifier": True}),
    "BertForQuestionAnswering": bert("BertForQuestionAnswering", {"qa_outputs": True}),
}  # fmt: skip


@pytest.fixture(params=HEADS.values(), ids=HEADS)
def head(request):
    return request.param


def inputs_for(head):
    generator = torch.Generator().manual_seed(0)
    config = tiny_config(head.model_type, **head.overrides)
    if head.model_type in ("vit", "swin"):
        side = config.image_size
        return {
            "pixel_values": torch.randn(2, config.num_channels, side, side, generator=generator)
        }
    shape = (2, 2, 8) if head.inputs == "choices" else (2, 8)
    batch = {"input_ids": torch.randint(1, config.vocab_size, shape, generator=generator)}
    if head.inputs == "cross":
        batch["encoder_hidden_states"] = torch.randn(2, 5, 16, generator=generator)
    return batch


def outputs_of(model, head):
    """Every floating-point tensor of the output, as one vector."""
    found = []

    def collect(value):
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                found.append(value.flatten())
        elif isinstance(value, dict | tuple | list):
            for part in value.values() if isinstance(value, dict) else value:
                collect(part)

    extra = {"use_cache": False} if head.model_type in ("gpt2", "bert") else {}
    collect(model(**inputs_for(head), **extra))
    return torch.cat(found)


def snapshot(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return values, [(name, type(module)) for name, module in model.named_modules()]


def same_snapshot(one, other):
    values, modules = one
    return (
        modules == other[1]
        and list(values) == list(other[0])
        and all(torch.equal(values[name], other[0][name]) for name in values)
    )


def test_every_head_class_of_transformers_is_here(model_type):
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    classes = {
        name
        for name, cls in vars(module).items()
        if inspect.isclass(cls)
        and issubclass(cls, transformers.PreTrainedModel)
        and cls.__module__ == module.__name__
        and not name.endswith(("PreTrainedModel", "Encoder"))  # the body of others, not a model
    }
    assert classes == {h.name for h in HEADS.values() if h.model_type == model_type}


def test_the_four_architectures_ship():
    assert set(MODEL_TYPES) <= set(hf_stable.supported_architectures())


def test_layers_and_roles_are_pinned(head):
    model = head.build()
    found = {layer.name: layer.roles for layer in find_layers(model)}
    assert found == head.roles()
    order = [name for name, _ in model.named_modules() if name in found]
    assert list(found) == order
    blocks = [block.name for block in find_blocks(model)]
    assert blocks == head.block_names()


def test_every_matrix_of_the_stock_model_is_known(head):
    model = head.build()
    matrices = {n for n, module in model.named_modules() if isinstance(module, LINEAR_TYPES)}
    assert matrices == head.roles().keys()


def test_norms_and_placements_are_pinned(head):
    model = head.build()
    found = {norm.name: norm.placement for norm in find_norms(model)}
    assert found == head.placements()
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    # A backbone normalises the features that it hands out; these norms are its outputs' own.
    assert {name for name in norms if not name.startswith("hidden_states_norms")} == found.keys()


def test_bert_has_no_pre_norms():
    for head in HEADS.values():
        placements = set(head.placements().values())
        assert ("pre" in placements) == (head.model_type != "bert")
        assert ("post" in placements) == (head.model_type == "bert")


@pytest.mark.parametrize("heads", ["skip", "include"])
def test_patched_names_are_pinned(head, heads):
    model = hf_stable.patch(head.build(), "sigma_reparam", heads=heads)
    patched = {name for name, module in model.named_modules() if isinstance(module, SigmaLayer)}
    untied = {name for name, is_free in head.heads.items() if is_free}
    inner = head.roles().keys() - head.heads.keys()
    assert patched == inner | (untied if heads == "include" else set())
    plain = {name for name, module in model.named_modules() if type(module) in LINEAR_TYPES}
    assert plain == head.roles().keys() - patched


@pytest.mark.parametrize("fused_qkv", ["split", "joint"])
def test_blocks_follow_the_roles(head, fused_qkv):
    model = hf_stable.patch(head.build(), "sigma_reparam", fused_qkv=fused_qkv)
    for name, module in model.named_modules():
        if isinstance(module, SigmaLayer):
            assert module.layer_name == name
            expected = len(head.roles()[name]) if fused_qkv == "split" else 1
            assert module.num_parts == len(module.gamma) == expected


def test_state_dict_keys_are_pinned(head):
    model = head.build()
    plain = set(model.state_dict())
    hf_stable.patch(model, "sigma_reparam")
    added = {
        f"{name}.{tensor}"
        for name in head.roles().keys() - head.heads.keys()
        for tensor in ("gamma", "sigma", "sigma_u", "sigma_v")
    }
    assert set(model.state_dict()) == plain | added and not plain & added


def fits(head, method):
    wanted = {"remove_pre_layernorm": "pre", "remove_layernorm": "post"}.get(method)
    return wanted is None or wanted in head.placements().values()


@pytest.mark.parametrize("method", METHODS)
def test_the_contract_of_a_method(head, method):
    """It changes the model, again changes nothing, trains, and comes off without a trace."""
    model = head.build()
    before, plain = snapshot(model), outputs_of(model, head)
    if not fits(head, method):
        with pytest.raises(hf_stable.UnsupportedModelError, match=f"{method} does not fit"):
            hf_stable.patch(model, method)
        assert same_snapshot(before, snapshot(model)) and not hf_stable.is_patched(model)
        return
    assert hf_stable.patch(model, method) is model and hf_stable.is_patched(model)
    patched = snapshot(model)
    assert not same_snapshot(before, patched)
    assert hf_stable.patch(model, method) is model
    assert same_snapshot(patched, snapshot(model))

    output = outputs_of(model, head)
    assert torch.equal(output, plain) == (method == "sigma_reparam") and output.isfinite().all()
    output.sin().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    if method == "sigma_reparam":
        for module in model.modules():
            if isinstance(module, SigmaLayer):
                assert module.gamma.grad.any(), module.layer_name

    undo = hf_stable.fold if method == "sigma_reparam" else hf_stable.restore_layernorms
    assert undo(model) is model and not hf_stable.is_patched(model)
    assert same_snapshot(before, snapshot(model))
    assert torch.equal(outputs_of(model, head), plain)


def test_init_one_changes_the_function_and_folds_to_it(head):
    model = head.build()
    plain = outputs_of(model, head)
    hf_stable.patch(model, "sigma_reparam", init="one", heads="include")
    patched = outputs_of(model, head)
    assert not torch.allclose(patched, plain, rtol=1e-2, atol=1e-3)
    hf_stable.fold(model)
    # The product of scaled weights rounds otherwise than the scaled product.
    torch.testing.assert_close(outputs_of(model, head), patched, rtol=1e-4, atol=1e-5)


FITTING = {f"{h}-{m}": (HEADS[h], m) for h in HEADS for m in METHODS if fits(HEADS[h], m)}


@pytest.mark.parametrize(("head", "method"), FITTING.values(), ids=FITTING)
def test_what_a_user_hangs_into_the_model_stays(head, method):
    model = head.build()
    block = find_blocks(model)[0].module
    mine = [nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Conv2d(1, 1, 1)]
    model.probe, block.adapter, block.adapter_norm, model.stem = mine
    before = [(type(module), module.weight.clone()) for module in mine]
    hf_stable.patch(model, method, **({"heads": "include"} if method == "sigma_reparam" else {}))
    assert (model.probe, block.adapter, block.adapter_norm, model.stem) == tuple(mine)
    for module, (kind, weight) in zip(mine, before, strict=True):
        assert type(module) is kind and torch.equal(module.weight, weight)

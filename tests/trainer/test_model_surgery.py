"""Adapters and resized embeddings of a patched model."""

from __future__ import annotations

import pytest
import torch
import transformers
from contract_models import SAME
from tiny_models import DEFAULT_HEADS, add_adapter, sgd_steps, tiny_batch, tiny_model

import hf_stable
from hf_stable.methods.sigma_reparam.method import sigma_layers

try:
    import peft
except ImportError:  # the oldest versions are tested without it
    peft = None

# PEFT (whose release reads a name that this transformers deprecates)

NEEDS_PEFT = pytest.mark.skipif(peft is None, reason="needs the package peft")


PEFTS_OWN = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def lora(**options):
    return peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=2, **options)


WAYS_TO_ADAPT = {
    "get_peft_model": lambda model: peft.get_peft_model(model, lora()),
    "inject_adapter_in_model": lambda model: peft.inject_adapter_in_model(lora(), model),
    "add_adapter": lambda model: add_adapter(model, lora()),
    "dora": lambda model: peft.get_peft_model(model, lora(use_dora=True)),
    "mixed": lambda model: peft.get_peft_model(model, lora(), mixed=True),
}


def with_prompts(model):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config)


@NEEDS_PEFT
@PEFTS_OWN
@pytest.mark.parametrize("inject", WAYS_TO_ADAPT.values(), ids=WAYS_TO_ADAPT)
def test_adapters_on_an_unfolded_model_are_refused(inject):
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"reparametrised.*hf_stable\.fold\(model\) first"):
        inject(model)
    assert [name for name, _ in model.named_modules()] == names


@NEEDS_PEFT
@PEFTS_OWN
@pytest.mark.parametrize(
    "inject", [*WAYS_TO_ADAPT.values(), with_prompts], ids=[*WAYS_TO_ADAPT, "prompts"]
)
def test_adapters_where_norms_were_removed_in_this_process_are_refused(inject):
    model = hf_stable.patch(tiny_model("gpt2"), "remove_pre_layernorm")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"4 LayerNorms.*hf_stable\.export\), load that folder"):
        inject(model)
    assert [name for name, _ in model.named_modules()] == names


@NEEDS_PEFT
@PEFTS_OWN
def test_folded_model_takes_an_adapter_and_merges_right():
    model = hf_stable.fold(hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")).eval()
    batch = tiny_batch(model)
    with torch.no_grad():
        plain = model(**batch).logits
        adapted = peft.get_peft_model(model, lora(init_lora_weights=False)).eval()
        with_adapter = adapted(**batch).logits
        merged = adapted.merge_and_unload()(**batch).logits
    torch.testing.assert_close(merged, with_adapter, **SAME)
    assert (merged - plain).abs().max() > 1e-3


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("size", [45, 33])
def test_resizing_keeps_the_function_ties_and_saving(name, size, tmp_path):
    model = hf_stable.patch(tiny_model(name), "sigma_reparam", init="one")
    sgd_steps(model)
    ids = torch.arange(1, 13)[None]
    before, layers = logits(model, ids), [layer for layer, _ in sigma_layers(model)]
    model.resize_token_embeddings(size, mean_resizing=False)
    after = logits(model, ids)
    assert after.shape[-1] == model.config.vocab_size == size
    common = min(size, before.shape[-1])
    torch.testing.assert_close(after[..., :common], before[..., :common])
    assert [layer for layer, _ in sigma_layers(model)] == layers
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is table.weight
    losses = sgd_steps(model.train())
    assert losses[0] != losses[-1]

    model.save_pretrained(tmp_path)
    plain, info = getattr(transformers, DEFAULT_HEADS[name]).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), **SAME)
    loaded = hf_stable.load(type(model), tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_resizing_a_reparametrised_head_is_refused_with_the_way_out():
    """transformers would put a plain layer with the raw weight in its place."""
    model = tiny_model("gpt2", tie_word_embeddings=False)
    hf_stable.patch(model, "sigma_reparam", init="one", heads="include")
    sgd_steps(model)
    ids = tiny_batch(model)["input_ids"]
    before = logits(model, ids)
    with pytest.raises(ValueError, match=r"'lm_head' is reparametrised.*hf_stable\.fold"):
        model.resize_token_embeddings(45)
    assert torch.equal(logits(model, ids), before)
    model.resize_token_embeddings(37)  # as large as it is: nothing is replaced
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    hf_stable.fold(model).resize_token_embeddings(45, mean_resizing=False)
    torch.testing.assert_close(logits(model, ids)[..., :37], before, **SAME)
    hf_stable.patch(model, "sigma_reparam", heads="include")
    assert "lm_head" in dict(sigma_layers(model))


def test_without_the_refusal_the_function_would_change():
    model = tiny_model("gpt2", tie_word_embeddings=False)
    hf_stable.patch(model, "sigma_reparam", init="one", heads="include")
    sgd_steps(model)
    ids = tiny_batch(model)["input_ids"]
    before = logits(model, ids)
    transformers.PreTrainedModel.resize_token_embeddings.__wrapped__(model, 45, mean_resizing=False)
    assert not torch.allclose(logits(model, ids)[..., :37], before, rtol=1e-2, atol=1e-3)

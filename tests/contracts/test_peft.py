"""PEFT after folding: adapters compute, merge and load on the plain base that fold leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from tiny_models import sgd_steps, tiny_batch, tiny_model
from tiny_training import make_trainer
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_stable
from hf_stable.methods.sigma_reparam.layers import SigmaConv1D, SigmaLinear
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.modeling_hf_stable import CLASS_PREFIX, GUARD

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning"  # PEFT's own
)

LAYERS = {
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
    "swin": ["q_proj", "v_proj", "fc1", "fc2"],
    "bert": ["query", "value", "intermediate.dense", "output.dense"],
}
FEEDFORWARD = {
    "gpt2": ["mlp.c_proj"],
    "vit": ["fc2"],
    "swin": ["fc2"],
    "bert": ["output.dense"],
}
PLAIN_TYPE = {"gpt2": Conv1D, "vit": nn.Linear, "swin": nn.Linear, "bert": nn.Linear}


def adapter_config(kind: str, model_type: str, **options):
    """A config whose adapter changes the model from the start."""
    common = dict(target_modules=LAYERS[model_type], fan_in_fan_out=model_type == "gpt2")
    if kind == "ia3":
        feedforward = FEEDFORWARD[model_type]
        return peft.IA3Config(**common, feedforward_modules=feedforward, init_ia3_weights=False)
    return peft.LoraConfig(
        **common, r=2, use_dora=kind == "dora", init_lora_weights=False, **options
    )


def folded(model_type: str):
    """A model that was trained with sigmaReparam and folded."""
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam", init="one")
    sgd_steps(model)
    return hf_stable.fold(model).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_batch(model)).logits


def types_of(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_fold_then_adapt_then_merge(model_type, kind, tmp_path):
    model = folded(model_type)
    plain_types, plain = types_of(model), logits(model)
    hf_stable.export(model, tmp_path / "base")

    adapted = peft.get_peft_model(model, adapter_config(kind, model_type))
    wrapped = [m for m in adapted.modules() if isinstance(m, BaseTunerLayer)]
    assert wrapped and all(type(m.get_base_layer()) is PLAIN_TYPE[model_type] for m in wrapped)
    with_adapter = logits(adapted)
    assert (with_adapter - plain).abs().max() > 1e-3

    adapted.save_pretrained(tmp_path / "adapter")
    base = type(model).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(base), plain, rtol=0, atol=0)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), with_adapter, rtol=0, atol=0)

    merged = adapted.merge_and_unload()
    # The product of the factors is added to the weight here, to the output before.
    torch.testing.assert_close(logits(merged), with_adapter, rtol=1e-4, atol=1e-5)
    assert types_of(merged) == plain_types
    hf_stable.patch(merged, "sigma_reparam")  # and what was merged can be patched anew
    torch.testing.assert_close(logits(merged), with_adapter, rtol=1e-4, atol=1e-5)


@pytest.fixture
def unguarded(monkeypatch):
    """PEFT as it is where hf_stable came too late to guard it."""
    monkeypatch.setattr(BaseTuner, "__init__", BaseTuner.__init__.__wrapped__)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_fold_works_inside_the_wrapper(unguarded, model_type, kind):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam", init="one")
    sgd_steps(model)
    adapted = peft.get_peft_model(model, adapter_config(kind, model_type))
    before = logits(adapted)
    assert hf_stable.is_patched(adapted)
    assert hf_stable.fold(adapted) is adapted
    assert not hf_stable.is_patched(adapted) and not sigma_layers(adapted)
    assert not {SigmaLinear, SigmaConv1D} & set(types_of(adapted).values())
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), before, rtol=1e-4, atol=1e-5)


def test_merging_what_was_not_folded_is_wrong(unguarded):
    """Why adapters on an unfolded model are refused."""
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam", init="one")
    sgd_steps(model)
    adapted = peft.get_peft_model(model, adapter_config("lora", "gpt2"))
    before = logits(adapted)
    assert (logits(adapted.merge_and_unload()) - before).abs().max() > 1e-2


def test_prompts_leave_the_weights_alone_and_are_allowed():
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam", init="one")
    sgd_steps(model)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        before = adapted(input_ids=torch.tensor([[1, 2, 3]])).logits
        hf_stable.fold(adapted)
        after = adapted(input_ids=torch.tensor([[1, 2, 3]])).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not hf_stable.is_patched(adapted)


def test_modules_to_save_need_a_folded_model_and_load_on_the_plain_base(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam", init="one", heads="include")
    sgd_steps(model)
    config = adapter_config("lora", "vit", modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"hf_stable\.fold\(model\) first"):
        peft.get_peft_model(model, config)
    hf_stable.fold(model)
    hf_stable.export(model, tmp_path / "base")
    adapted = peft.get_peft_model(model, config)
    start = logits(adapted)
    sgd_steps(adapted)
    after = logits(adapted)
    assert (after - start).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    names = list(peft.utils.load_peft_weights(str(tmp_path / "adapter")))
    assert any("classifier.weight" in name for name in names)
    assert not any("gamma" in name or "sigma" in name for name in names)
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), after, rtol=0, atol=0)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw2"])
def test_the_trainer_trains_and_resumes_adapters_on_a_folded_model(optim, tmp_path):
    def trainer(**options):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(folded("gpt2"), adapter_config("lora", "gpt2"))
        return make_trainer(adapted, tmp_path, optim=optim, max_steps=4, save_steps=2, **options)

    whole = trainer()
    whole.train()
    names = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and not any("hf_stable" in n for n in names)
    resumed = trainer()
    start = logits(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.model), logits(whole.model), rtol=0, atol=0)
    assert (logits(resumed.model) - start).abs().max() > 1e-3


REMOVAL = {"gpt2": "remove_pre_layernorm", "bert": "remove_layernorm"}


@pytest.mark.parametrize("name", REMOVAL)
def test_adapters_on_a_model_without_layernorms(name, tmp_path):
    """The base is published in its guarded form; the adapter goes on it, and merges into it."""
    model = hf_stable.patch(tiny_model(name), [REMOVAL[name], "sigma_reparam"])
    sgd_steps(model)
    hf_stable.export(model, tmp_path / "base")
    base_class = getattr(hf_stable.modeling_hf_stable, CLASS_PREFIX + type(model).__name__)
    base = base_class.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, adapter_config("lora", name))
    with_adapter = logits(adapted)
    assert (with_adapter - logits(model)).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        base_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(again), with_adapter, rtol=0, atol=0)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert GUARD in json.loads((tmp_path / "merged" / "config.json").read_text()).values()
    loaded = base_class.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), with_adapter, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_adapter_works_where_there_is_no_hf_stable(tmp_path):
    model = folded("gpt2")
    hf_stable.export(model, tmp_path / "base")
    adapted = peft.get_peft_model(model, adapter_config("lora", "gpt2"))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    batch = tiny_batch(model)
    torch.save({"ids": batch["input_ids"], "logits": expected}, tmp_path / "case.pt")
    script = (
        "import sys, peft, torch, transformers\n"
        "base = transformers.AutoModelForCausalLM.from_pretrained('base')\n"
        "model = peft.PeftModel.from_pretrained(base, 'adapter').eval()\n"
        "case = torch.load('case.pt')\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(model(case['ids']).logits, case['logits'])\n"
        "    merged = model.merge_and_unload()\n"
        "    torch.testing.assert_close(merged(case['ids']).logits, case['logits'],\n"
        "                               rtol=1e-4, atol=1e-5)\n"
        "assert 'hf_stable' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]

"""The Trainer on two processes, DDP and the real FSDP2: checkpoints, resume and AdamW2's groups."""

from __future__ import annotations

import pytest
import torch
import transformers
from contract_models import SAME
from gloo_ranks import run_ranks
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import tiny_batch
from tiny_training import dropout_model, losses, make_trainer, shard_on_cpus
from torch.distributed.tensor import DTensor

import hf_stable
from hf_stable._file_names import SIDECAR_FILE

pytestmark = pytest.mark.slow


def resume_on_ranks(folder, mode, methods):
    """Train four steps, and two of them again from a checkpoint; what is found on every rank."""
    if mode != "ddp":
        shard_on_cpus()

    def run(name, **options):
        model = hf_stable.patch(dropout_model("gpt2"), methods)
        if mode != "ddp":
            options |= dict(fsdp=True, fsdp_config={
                "version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"],
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": mode,
            })  # fmt: skip
        return make_trainer(
            model, folder / name, optim="adamw2", max_steps=4, weight_decay=0.1,
            per_device_train_batch_size=4, **options,
        )  # fmt: skip

    whole = run("whole", save_steps=2)
    whole.train()
    resumed = run("resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    groups = whole.optimizer.param_groups
    layers = [module for module in whole.model.modules() if hasattr(module, "gamma")]
    gammas = {id(layer.gamma) for layer in layers}
    decays = {g["weight_decay"] for g in groups for p in g["params"] if id(p) in gammas}
    return {
        "whole": losses(whole),
        "resumed": losses(resumed),
        "sharded": isinstance(layers[0].weight, DTensor),
        "parts": sorted({len(group["parts"][0]) for group in groups}),
        "tau": sorted({group["tau"] for group in groups}),
        "gamma_decay": sorted(decays),
    }


def resumes(engine):
    """The mark of a test that resumes a GPT-2 exactly."""
    method = "sigmaReparam and AdamW2"
    return pytest.mark.parity(engine=engine, models=("GPT-2",), method=method, same=("resume",))


@pytest.mark.parametrize(
    ("mode", "has_norms"),
    [
        pytest.param("ddp", True, marks=resumes("DDP")),
        pytest.param("FULL_STATE_DICT", True, marks=resumes("FSDP2")),
        ("SHARDED_STATE_DICT", True),
        ("ddp", False),
        ("FULL_STATE_DICT", False),
    ],
)
def test_two_processes_resume_exactly(mode, has_norms, tmp_path):
    methods = ["sigma_reparam"] + ([] if has_norms else ["remove_pre_layernorm"])
    result, _ = run_ranks(resume_on_ranks, 2, tmp_path, mode, methods)
    assert result["sharded"] == (mode != "ddp")
    assert len(result["whole"]) == 4
    assert result["whole"] == result["resumed"]
    assert result["parts"] == [1, 3]
    assert result["tau"] == [0.01, float("inf")]
    assert result["gamma_decay"] == [0.0]
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    if mode == "SHARDED_STATE_DICT":
        assert not (checkpoint / "model.safetensors").exists()
        return
    assert (checkpoint / SIDECAR_FILE).is_file()
    loader = transformers.GPT2LMHeadModel
    if not has_norms:
        with pytest.raises(StrictDataclassFieldValidationError, match="LayerNorms of this model"):
            loader.from_pretrained(checkpoint)
        loader = transformers.AutoModelForCausalLM
    plain = loader.from_pretrained(checkpoint)
    assert any("ln_1" in name for name, _ in plain.named_parameters()) == has_norms
    patched = hf_stable.load(transformers.GPT2LMHeadModel, checkpoint)
    batch = tiny_batch(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, patched(**batch).logits, **SAME)

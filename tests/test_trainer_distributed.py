"""The Trainer on two processes, DDP and the real FSDP2: checkpoints, resume and AdamW2's groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_batch
from huggingface_hub.errors import StrictDataclassFieldValidationError

import hf_stable
from hf_stable.patching import STATE_FILE

pytestmark = pytest.mark.slow

RANK = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
folder, mode, *methods = sys.argv[2:]
import accelerate.state as state
import torch
from torch.distributed.tensor import DTensor

if mode != "ddp":
    # accelerate takes its FSDP branch for accelerators only, and runs DDP on CPUs without a word.
    started = state.PartialState.__init__
    def start(self, *args, **kwargs):
        started(self, *args, **kwargs)
        if self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type = state.DistributedType.MULTI_GPU
    state.PartialState.__init__ = start

import hf_stable
from tiny_training import dropout_model, losses, make_trainer

def run(name, **options):
    model = hf_stable.patch(dropout_model("gpt2"), methods)
    if mode != "ddp":
        options |= dict(fsdp=True, fsdp_config={
            "version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"],
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": mode,
        })
    return make_trainer(
        model, os.path.join(folder, name), optim="adamw2", max_steps=4, weight_decay=0.1,
        per_device_train_batch_size=4, **options,
    )

whole = run("whole", save_steps=2)
whole.train()
resumed = run("resumed", save_strategy="no")
resumed.train(resume_from_checkpoint=os.path.join(folder, "whole", "checkpoint-2"))
groups = whole.optimizer.param_groups
if whole.args.process_index == 0:
    layers = [m for m in whole.model.modules() if hasattr(m, "gamma")]
    gammas = {id(layer.gamma) for layer in layers}
    print("RESULT", json.dumps({
        "whole": losses(whole), "resumed": losses(resumed),
        "sharded": isinstance(layers[0].weight, DTensor),
        "blocks": sorted({group["blocks"] for group in groups}),
        "tau": sorted({group["tau"] for group in groups}),
        "gamma_decay": sorted({g["weight_decay"] for g in groups for p in g["params"]
                               if id(p) in gammas}),
    }))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def launch(mode: str, folder: Path, methods: list[str]) -> dict:
    script = folder / "rank.py"
    script.write_text(RANK)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", script, Path(__file__).parent, folder, mode, *methods),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.parametrize(
    ("mode", "has_norms"),
    [
        ("ddp", True),
        ("FULL_STATE_DICT", True),
        ("SHARDED_STATE_DICT", True),
        ("ddp", False),
        ("FULL_STATE_DICT", False),
    ],
)
def test_two_processes_resume_exactly(mode, has_norms, tmp_path):
    methods = ["sigma_reparam"] + ([] if has_norms else ["remove_pre_layernorm"])
    result = launch(mode, tmp_path, methods)
    assert result["sharded"] == (mode != "ddp")
    assert len(result["whole"]) == 4
    assert result["whole"] == result["resumed"]
    assert result["blocks"] == [1, 3]
    assert result["tau"] == [0.01, float("inf")]
    assert result["gamma_decay"] == [0.0]
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    if mode == "SHARDED_STATE_DICT":
        assert not (checkpoint / "model.safetensors").exists()
        return
    assert (checkpoint / STATE_FILE).is_file()
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
        torch.testing.assert_close(
            plain(**batch).logits, patched(**batch).logits, rtol=1e-4, atol=1e-5
        )

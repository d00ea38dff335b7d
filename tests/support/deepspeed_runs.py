"""Short runs of the Trainer under DeepSpeed ZeRO on two processes, and what is asked of them."""

from __future__ import annotations

import hashlib

import pytest
import tiny_architectures
import torch
import torch.distributed as dist
from tiny_models import DEFAULT_HEADS, tiny_model
from tiny_training import dataset, dropout_model, make_trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import hf_stable
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.part_arithmetic import sigma_of

GLOBAL_BATCH = 8
STEPS = 6

ROUNDING = 2e-6
"""float32 rounds by 6e-8. Ranks and micro-batches sum in another order, and six steps add up."""

HEADS = DEFAULT_HEADS | {"bert": "BertForSequenceClassification"}

UNDER_ADAMW2 = dict(optim="adamw2", optim_args="tau=0.004")


@pytest.fixture(autouse=True, scope="module")
def told_accelerator():
    """DeepSpeed looks for an accelerator, and is told that there is none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


def settings(precision="fp32", **zero):
    """A DeepSpeed config that leaves to the Trainer what it can."""
    if zero["stage"] == 3:  # however small, a parameter is partitioned; folders have all weights
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    config = {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return config if precision == "fp32" else config | {precision: {"enabled": True}}


def make_model(name, dropout=False):
    if name in ("llama", "mixtral"):
        return tiny_architectures.build(name)
    return dropout_model(name) if dropout else tiny_model(name, HEADS[name])


def train(name, folder, world=1, model=None, resume=None, callbacks=(), **options):
    """A few steps of a patched model on one global batch, in two micro-batches."""
    unset_hf_deepspeed_config()  # of an earlier Trainer, whose stage 3 would partition the model
    model = make_model(name) if model is None else model
    hf_stable.patch(model, "sigma_reparam")
    trainer = make_trainer(
        model, folder, max_steps=STEPS, weight_decay=0.1, max_grad_norm=0.5,
        callbacks=[hf_stable.StabilityCallback(every=3)] if name == "gpt2" else [],
        gradient_accumulation_steps=2, per_device_train_batch_size=GLOBAL_BATCH // 2 // world,
        **(dict(save_strategy="no", optim="adamw_torch") | options),
    )  # fmt: skip
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.model_accepts_loss_kwargs &= name != "bert"  # see tests/contracts/test_parity.py
    trainer.train_dataset = examples = dataset(model)
    if name == "bert":
        trainer.train_dataset = [e | {"labels": e["labels"][0] % 2} for e in examples]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def digest(model):
    """A digest of what every rank has to agree on."""
    tensors = []
    for _, layer in sigma_layers(model):
        with whole(layer):
            tensors += [
                getattr(layer, part).detach().float().clone()
                for part in ("gamma", "sigma", "sigma_u", "sigma_v")
            ]
    numbers = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(numbers).hexdigest()


def whole(layer):
    """Have the parameters of a layer whole, where ZeRO-3 has partitioned them."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(layer.parameters()))


def same_on_ranks(model):
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest(model))
    return len(set(digests)) == 1


def largest_error(model):
    """The largest relative error of a sigma against `u.T W v` of the weights as they are."""
    worst = 0.0
    for _, layer in sigma_layers(model):
        with whole(layer), torch.no_grad():
            now = sigma_of(layer.weight, layer.sigma_u, layer.sigma_v, layer.parts)
        worst = max(worst, (now / layer.sigma - 1).abs().max().item())
    return worst


def adamw2_of(trainer):
    """The optimizer inside all wrappers."""
    optimizer = trainer.optimizer
    while not isinstance(optimizer, hf_stable.AdamW2):
        optimizer = optimizer.optimizer
    return optimizer


def losses_of(trainer):
    return {r["step"]: r["loss"] for r in trainer.state.log_history if "loss" in r}

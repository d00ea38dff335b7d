"""A few real Trainer steps on a tiny model, with everything random switched on."""

from __future__ import annotations

import accelerate
import torch
from tiny_models import tiny_batch, tiny_model
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer, TrainerCallback, TrainingArguments

DROPOUT = {
    "gpt2": dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
    "bert": dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
    "vit": dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
    "swin": dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, drop_path_rate=0.1),
}


class Interrupt(TrainerCallback):
    """Stops after a step, as a job that runs out of time does, once its checkpoint is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def dropout_model(model_type: str, **overrides):
    """A tiny model with dropout on."""
    return tiny_model(model_type, **(DROPOUT[model_type] | overrides))


def dataset(model, size: int = 40, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Examples for one of the default heads."""
    batch = tiny_batch(model, size=size, seed=seed)
    return [{key: value[i] for key, value in batch.items()} for i in range(size)]


def make_trainer(
    model, folder, *, callbacks=(), model_init=None, trainer_class=None, rows=None, **options
):
    """A Trainer on the CPU that writes a checkpoint and a loss at every step.

    `rows` are other examples than those of the default heads, to train and to evaluate on. Without
    a `trainer_class` it is this module's `Trainer`, which a test may replace.
    """
    settings = dict(
        max_steps=6, per_device_train_batch_size=8, per_device_eval_batch_size=8,
        learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=0,
        save_strategy="steps", save_steps=1, logging_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    args = TrainingArguments(str(folder), **(settings | options))
    examples = model if model is not None else model_init()
    return (trainer_class or Trainer)(
        model,
        args,
        model_init=model_init,
        train_dataset=dataset(examples) if rows is None else rows,
        eval_dataset=dataset(examples, seed=2) if rows is None else rows,
        callbacks=list(callbacks),
    )


def shard_on_cpus() -> None:
    """Make accelerate take its FSDP branch in this process.

    It takes it for accelerators only, and runs DDP on CPUs without a word.
    """
    started = accelerate.state.PartialState.__init__

    def start(self, *args, **kwargs):
        started(self, *args, **kwargs)
        if self.distributed_type == accelerate.state.DistributedType.MULTI_CPU:
            self.distributed_type = accelerate.state.DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = start
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # there is no device to pin memory for


def losses(trainer) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, exactly as logged."""
    return {
        record["step"]: (record["loss"], record["grad_norm"])
        for record in trainer.state.log_history
        if "loss" in record
    }


def same_state(first, second) -> bool:
    """Say whether two models hold the same tensors, bit for bit."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

"""Inputs for the tiny models: padded batches, labels, and what a Trainer takes."""

from __future__ import annotations

import functools
import gc

import numpy as np
import torch
from tiny_architectures import MODELS, batch, main_output
from tiny_training import make_trainer
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

PADDING = 3
"""Tokens at the end of the second sequence that are padding; of samples, as many eighths."""


def padded(name: str) -> dict[str, torch.Tensor] | None:
    """A batch whose second sequence is shorter; None where a model takes no such thing."""
    inputs = batch(name)
    keys = {"input_ids": "attention_mask", "input_values": "attention_mask",
            "decoder_input_ids": "decoder_attention_mask"}  # fmt: skip
    if name == "speech_to_text":
        keys["input_features"] = "attention_mask"
    masks = {}
    for key, mask in keys.items():
        if key in inputs:
            length = inputs[key].shape[1]
            masks[mask] = torch.ones(inputs[key].shape[:2], dtype=torch.long)
            masks[mask][1, length - length * PADDING // 8 :] = 0
    return inputs | masks if masks else None


def labelled(name: str, size: int = 2) -> dict[str, torch.Tensor]:
    """A batch with the labels that the model's own loss wants; without, where it has none."""
    head, inputs = MODELS[name][0], batch(name, size)
    if "ForCTC" in head:
        return inputs | {"labels": torch.arange(3, 6).repeat(size, 1)}
    if "ForImageClassification" in head or "ForVideoClassification" in head:
        return inputs | {"labels": torch.arange(size) % 2}
    if head.endswith(("ForCausalLM", "ForMaskedLM", "LMHeadModel")):
        return inputs | {"labels": inputs["input_ids"]}
    if "decoder_input_ids" in inputs:
        return inputs | {"labels": inputs["decoder_input_ids"].contiguous()}
    return inputs


def loss_of(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss; of one that has none, the mean square of its main output."""
    found = model(**inputs)
    loss = found.get("loss")
    return main_output(found).square().mean() if loss is None else loss


def seed(number: int = 3) -> None:
    """Seed what the models draw from: torch for dropout, numpy for masks over time."""
    torch.manual_seed(number)
    np.random.seed(number)


class Rows(Dataset):
    """Examples of one batch, one by one."""

    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.columns.items()}


class LossTrainer(Trainer):
    """A Trainer that also trains models without a loss of their own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return loss_of(model, inputs)


class SaveAt(TrainerCallback):
    """Writes one checkpoint: the Trainer itself would write another at the end."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == self.step


def trainer_for(name: str, model, folder, save_at: int | None = None, **options) -> Trainer:
    """A Trainer for two steps, with eight examples in batches of four."""
    settings = dict(per_device_train_batch_size=4, max_steps=2, save_strategy="no")
    return make_trainer(
        model, folder, trainer_class=LossTrainer, rows=Rows(labelled(name, 8)),
        callbacks=[SaveAt(save_at)], **(settings | options),
    )  # fmt: skip


@functools.cache
def leave_imports_out() -> None:
    """Do once more, when a Trainer has run, what tests/conftest.py does with what is imported.

    The first Trainer imports the whole of DeepSpeed where that is installed, and every later one
    would go through it for the full collection that it asks for.
    """
    gc.collect()
    gc.freeze()

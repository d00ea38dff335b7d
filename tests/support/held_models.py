"""A module of a user's own that holds a transformers model, as many training scripts have one."""

from __future__ import annotations

import torch
from tiny_models import tiny_config
from torch import nn
from transformers import BertModel, Trainer, TrainingArguments

import hf_stable


class Classifier(nn.Module):
    """Labels a text by the mean of BERT's last states; it has no config and no dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel(tiny_config("bert", hidden_dropout_prob=0.1))
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids=None, labels=None):
        logits = self.head(self.bert(input_ids=input_ids).last_hidden_state.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def texts(size: int = 40) -> list[dict[str, torch.Tensor]]:
    """Examples for it."""
    ids = torch.randint(0, 37, (size, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def held_model(*methods: str, seed: int = 0, **options) -> Classifier:
    """One whose BERT is patched."""
    torch.manual_seed(seed)
    model = Classifier()
    if methods:
        hf_stable.patch(model.bert, list(methods) if len(methods) > 1 else methods[0], **options)
    return model


def held_trainer(model, folder, *, trainer_class=Trainer, callbacks=(), **options) -> Trainer:
    """A Trainer on the CPU that writes a checkpoint and a loss at every step."""
    settings = dict(
        max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, optim="adamw2",
        save_strategy="steps", save_steps=1, logging_steps=1, report_to="none",
        disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    args = TrainingArguments(str(folder), **(settings | options))
    return trainer_class(model, args, train_dataset=texts(), callbacks=list(callbacks))

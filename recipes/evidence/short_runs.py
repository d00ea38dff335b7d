"""Short runs: small models from scratch, or fine-tuned after they have learnt another task.

The models have two or three blocks of width 48. The ViT learns the digits 0 to 4 and is fine-tuned
on 5 to 9. The BERT learns to tell five modules of the standard library apart and is fine-tuned on
five others. The GPT-2 learns to continue source code and is fine-tuned to tell ten modules apart.
Fine-tuning starts with a fresh head and trains all weights. Schedules are linear.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import hf_stable
from recipes import data
from recipes.data import Examples, Task

__all__ = ["PLAIN", "PLANNED", "WARM", "Method", "Setup", "run"]

WIDTH, BATCH, TOKENS = 48, 8, 32
PRETRAINING = dict(steps=500, rate=1e-3)


@dataclass(frozen=True)
class Setup:
    """What is trained, how fast and for how long; all methods and seeds of it are compared.

    Attributes:
        model: "ViT", "BERT" or "GPT-2".
        start: "scratch", "fine-tuned", or "two classes": fine-tuned to tell two classes apart.
        rate: the highest.
        steps: of the optimizer.
    """

    model: str
    start: str
    rate: float
    steps: int

    @property
    def name(self) -> str:
        """Return what tells it from others."""
        return f"{self.model} {self.start}, {self.rate:g}, {self.steps} steps"


@dataclass(frozen=True)
class Method:
    """An optimizer.

    Attributes:
        name: in tables.
        tau: of AdamW2; None for AdamW.
        warmup: share of the steps.
    """

    name: str
    tau: float | str | None = None
    warmup: float = 0.0


PLAIN, WARM = Method("AdamW"), Method("AdamW, warmup", warmup=0.2)
PLANNED = Method("tau=auto", "auto")


@functools.cache
def task_of(model: str, start: str) -> Task:
    """Return what a model trains on: the task of "scratch", "before" fine-tuning, or the one after.

    Args:
        model: as in `Setup`.
        start: as in `Setup`, or "before".
    """
    if model == "ViT":
        task = data.digits(size=14)
    elif model == "BERT" or start == "fine-tuned":
        task = _short(data.which_module())
    else:
        return _short(data.next_tokens())
    if start == "scratch" or model not in ("ViT", "BERT"):
        return task
    half = task.num_labels // 2
    last = half + 2 if start == "two classes" else task.num_labels
    kept = range(half) if start == "before" else range(half, last)
    return task._replace(
        train=_only(task.train, kept), test=_only(task.test, kept),
        num_labels=len(kept), reference=math.log(len(kept)),
    )  # fmt: skip


def _short(task: Task) -> Task:
    """Return a task on text with windows of `TOKENS`."""

    def cut(examples: Examples) -> Examples:
        columns = examples.columns.items()
        return Examples(**{k: c[:, :TOKENS] if c.ndim > 1 else c for k, c in columns})

    return task._replace(train=cut(task.train), test=cut(task.test))


def _only(examples: Examples, labels: range) -> Examples:
    """Return the examples of some labels, which are counted from 0 anew."""
    given = examples.columns["labels"]
    chosen = (given >= labels[0]) & (given <= labels[-1])
    columns = {name: column[chosen] for name, column in examples.columns.items()}
    return Examples(**columns | {"labels": columns["labels"] - labels[0]})


def build(model: str, task: Task) -> Any:
    """Return a fresh model for a task, as transformers initialises it."""
    if model == "ViT":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(
                image_size=task.image_size, patch_size=task.image_size // 4, num_channels=1,
                hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2,
                intermediate_size=4 * WIDTH, num_labels=task.num_labels,
            )
        )  # fmt: skip
    if model == "BERT":
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=task.vocabulary, hidden_size=WIDTH, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=4 * WIDTH, num_labels=task.num_labels,
                max_position_embeddings=TOKENS, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, pad_token_id=0,
            )
        )  # fmt: skip
    options = dict(
        vocab_size=task.vocabulary, n_positions=TOKENS, n_embd=WIDTH, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    if task.num_labels == task.vocabulary:
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
    options["num_labels"] = task.num_labels
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**options))


@functools.cache
def pretrained(model: str) -> dict[str, Tensor]:
    """Return the weights of a model that has learnt the task before fine-tuning."""
    task = task_of(model, "before")
    transformers.set_seed(1000)
    trained = build(model, task)
    train(trained, task, WARM, seed=1000, **PRETRAINING)
    return trained.base_model.state_dict()


def start_of(setup: Setup, seed: int) -> Any:
    """Return the model that a run of a set-up starts with."""
    body = None if setup.start == "scratch" else pretrained(setup.model)
    transformers.set_seed(seed)
    model = build(setup.model, task_of(setup.model, setup.start))
    if body is not None:
        model.base_model.load_state_dict(copy.deepcopy(body), strict=setup.model != "ViT")
    return model


def batches(task: Task, steps: int, *, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches, epoch by epoch, the same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(task.train), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        yield {name: column[chosen] for name, column in task.train.columns.items()}


def train(
    model: Any, task: Task, method: Method, *, steps: int, rate: float, seed: int
) -> float | None:
    """Train a model in place; return AdamW2's tau."""
    groups = hf_stable.parameter_groups(model)
    if method.tau is None:
        optimizer: Any = torch.optim.AdamW(groups, lr=rate, fused=True)
    elif method == PLANNED:
        # A linear schedule comes to half of the steps at the full rate.
        optimizer = hf_stable.AdamW2(groups, lr=rate, tau="auto", total_steps=(steps + 1) / 2)
    else:
        optimizer = hf_stable.AdamW2(groups, lr=rate, tau=method.tau)
    scheduler = transformers.get_scheduler(
        "linear", optimizer, num_warmup_steps=round(method.warmup * steps), num_training_steps=steps
    )
    for batch in batches(task, steps, seed=seed):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
    return optimizer.defaults.get("tau")


@torch.no_grad()
def test(model: Any, task: Task) -> tuple[float, float]:
    """Return loss and accuracy on the test examples, of next tokens or of labels."""
    model.eval()
    columns, size = task.test.columns, len(task.test)
    losses, right, total = [], 0.0, 0.0
    for chosen in torch.arange(size).split(64):
        batch = {name: column[chosen] for name, column in columns.items()}
        out, labels = model(**batch), batch["labels"]
        logits = out.logits
        if labels.ndim > 1:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses.append(float(out.loss) * len(chosen))
        right += float((logits.argmax(-1) == labels).sum())
        total += labels.numel()
    return sum(losses) / size, right / total


def run(setup: Setup, method: Method, seed: int) -> dict[str, Any]:
    """Train and test once."""
    started = time.thread_time()
    task, model = task_of(setup.model, setup.start), start_of(setup, seed)
    tau = train(model, task, method, steps=setup.steps, rate=setup.rate, seed=seed)
    loss, accuracy = test(model, task)
    return {
        "setup": setup.name, "method": method.name, "seed": seed, "tau": tau,
        "loss": float(f"{loss:.4g}") if math.isfinite(loss) else None,
        "accuracy": round(accuracy, 3), "seconds": round(time.thread_time() - started, 2),
    }  # fmt: skip

"""The runs of the demo: a small ViT on handwritten digits and the real Trainer, on the CPU."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_stable.architectures.finding import find_layers
from hf_stable.commands.demo.digits import accuracy_metric
from hf_stable.measures.leading import leading_triple
from hf_stable.measures.matrices import as_matrix
from hf_stable.methods.describing import describe
from hf_stable.methods.patching import is_patched, patch
from hf_stable.monitor.callback import StabilityCallback

__all__ = ["DemoRun", "RunResult", "run_folder", "train"]


@dataclass(frozen=True)
class DemoRun:
    """One training run; everything that is not named here is the same in all of them.

    Attributes:
        name: label in tables and name of the run's folder.
        init: `"std"` keeps transformers' N(0, 0.02), `"xavier"` draws xavier_uniform.
        learning_rate: peak rate; a cosine takes it to zero.
        warmup: share of the steps that the rate rises linearly in.
        weight_decay: decoupled weight decay.
        optim: name for `TrainingArguments(optim=...)`.
        optim_args: its arguments.
        patched: whether the model is patched with sigmaReparam, `init="one"`.
        remark: what it means if this run does better than its part's challenger.
    """

    name: str
    init: str
    learning_rate: float = 1e-2
    warmup: float = 0.0
    weight_decay: float = 0.0
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    patched: bool = False
    remark: str = ""


@dataclass(frozen=True)
class RunResult:
    """What a run ended with, on the test images.

    Attributes:
        name: name of the run.
        loss: mean cross-entropy in nats; chance is log(10) = 2.303.
        accuracy: share of right answers.
        sigma: smallest largest-singular-value of the model's raw matrices, the head left out.
        gamma: smallest gamma, or None where nothing is patched.
        seconds: wall time of training.
    """

    name: str
    loss: float
    accuracy: float
    sigma: float
    gamma: float | None
    seconds: float

    def beats(self, other: RunResult) -> bool:
        """Say whether the loss is lower and the accuracy higher; a NaN loss beats nothing."""
        other_loss = math.inf if math.isnan(other.loss) else other.loss
        return self.loss < other_loss and self.accuracy > other.accuracy


def _build_model(run: DemoRun, seed: int, quick: bool) -> ViTForImageClassification:
    set_seed(seed)
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2 if quick else 8,
        num_attention_heads=2,
        intermediate_size=256,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    if run.init == "xavier":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
    if run.patched:
        patch(model, "sigma_reparam", init="one")
    return model


def train(run: DemoRun, data: Any, output: Path, *, seed: int, quick: bool) -> RunResult:
    """Do one run with the Trainer; save the model and its answers if it is patched."""
    folder = run_folder(run, output)
    model = _build_model(run, seed, quick)
    metric = accuracy_metric(folder)

    def compute_metrics(prediction: Any) -> Any:
        return metric.compute(
            predictions=prediction.predictions.argmax(-1), references=prediction.label_ids
        )

    trainer = Trainer(
        model,
        _arguments(run, folder, seed, quick),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=compute_metrics,
        callbacks=[StabilityCallback(every=2 if quick else 25, maps=[0])],
    )
    seconds = trainer.train().metrics["train_runtime"]
    answers = trainer.predict(data["test"], metric_key_prefix="test")
    metrics: Any = answers.metrics
    # The Trainer logs evaluations, but not predictions: the report is to have the accuracy.
    trainer.log({"test_loss": metrics["test_loss"], "test_accuracy": metrics["test_accuracy"]})
    trainer.save_state()
    if run.patched:
        trainer.save_model(str(output / "model"))
        _save_answers(output, data["test"], torch.as_tensor(answers.predictions))
    sigma, gamma = _smallest_scales(model)
    return RunResult(
        run.name, metrics["test_loss"], metrics["test_accuracy"], sigma, gamma, seconds
    )


def _arguments(run: DemoRun, folder: Path, seed: int, quick: bool) -> TrainingArguments:
    steps = 4 if quick else 250
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=steps,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(run.warmup * steps),
        weight_decay=run.weight_decay,
        optim=run.optim,
        optim_args=run.optim_args,
        adam_beta1=0.9,
        adam_beta2=0.99,
        max_grad_norm=0.0,
        per_device_train_batch_size=8 if quick else 32,
        per_device_eval_batch_size=120,
        logging_steps=1 if quick else 50,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=not sys.stderr.isatty(),
        seed=seed,
    )


def _smallest_scales(model: nn.Module) -> tuple[float, float | None]:
    """Return the smallest sigma and, of a patched model, the smallest gamma."""
    if is_patched(model):
        layers = [layer for layer in describe(model).layers if layer.skipped is None]
        return min(min(row.sigma) for row in layers), min(min(row.gamma) for row in layers)
    modules: list[Any] = [layer.module for layer in find_layers(model) if "head" not in layer.roles]
    matrices = [as_matrix(module.weight) for module in modules]
    if not all(torch.isfinite(matrix).all() for matrix in matrices):
        return math.nan, None
    return min(leading_triple(matrix).sigma.item() for matrix in matrices), None


def _save_answers(output: Path, test: Any, logits: torch.Tensor) -> None:
    digits = {"pixel_values": test["pixel_values"][:], "labels": test["labels"][:]}
    save_file(digits | {"logits": logits}, output / "test_digits.safetensors")


def run_folder(run: DemoRun, output: Path) -> Path:
    """Return the folder that a run writes its logs to."""
    slug = "".join(c if c.isalnum() else "-" for c in run.name.lower()).strip("-")
    return output / "runs" / slug

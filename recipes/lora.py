"""At which learning rates LoRA fine-tuning fails, under AdamW and under AdamW2's two bounds.

A small ViT learns the digits 0 to 4 that come with scikit-learn; LoRA on all its linear layers,
with a new head, then learns the digits 5 to 9. Every optimizer does that at every rate, without
warmup. About ten minutes on one core:

    python recipes/lora.py --output recipes/evidence/lora.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from sklearn.datasets import load_digits
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import hf_stable  # noqa: F401 (registers optim="adamw2")

NUM_CLASSES = 5
CHANCE = math.log(NUM_CLASSES)
TEST_SHARE = 0.2

TAU = 0.01
OPTIMIZERS = {
    "AdamW": dict(optim="adamw_torch_fused"),
    "AdamW2, factors": dict(optim="adamw2", optim_args=f"tau={TAU}"),
    "AdamW2, merged": dict(optim="adamw2", optim_args=f"tau={TAU},lora=merged"),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SEEDS = (0, 1, 2)

STEPS = 200
PRETRAINING_STEPS = 400
LORA = dict(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])


class WorstLoss(TrainerCallback):
    """Remembers the largest loss that was logged."""

    def __init__(self) -> None:
        """Start below every loss."""
        self.value = -math.inf

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Look at the loss of a step; a NaN counts as infinite."""
        if logs and "loss" in logs:
            loss = logs["loss"]
            self.value = max(self.value, math.inf if math.isnan(loss) else loss)


def load_tasks() -> list[dict[str, list[dict[str, torch.Tensor]]]]:
    """Return train and test examples of the digits 0 to 4, and of 5 to 9 with labels 0 to 4."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    pixels = (pixels - pixels.mean()) / pixels.std()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    tasks = []
    for first in (0, NUM_CLASSES):
        examples = [
            {"pixel_values": pixels[i], "labels": torch.tensor(int(labels[i]) - first)}
            for i in order.tolist()
            if first <= labels[i] < first + NUM_CLASSES
        ]
        cut = int(TEST_SHARE * len(examples))
        tasks.append({"train": examples[cut:], "test": examples[:cut]})
    return tasks


def make_model() -> ViTForImageClassification:
    """Return a ViT of 0.3 M parameters with xavier_uniform weights."""
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=6,
        num_attention_heads=2, intermediate_size=256, num_labels=NUM_CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    return model


def train(
    model: torch.nn.Module, task: dict[str, Any], *, seed: int, steps: int, **options: Any
) -> dict[str, Any]:
    """Train for some steps and return what came of it, on the test examples."""
    worst = WorstLoss()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32,
            per_device_eval_batch_size=256, lr_scheduler_type="linear", warmup_steps=0,
            weight_decay=0.0, logging_steps=1, logging_nan_inf_filter=False, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, seed=seed, **options,
        )  # fmt: skip
        trainer = Trainer(
            model,
            args,
            train_dataset=task["train"],
            eval_dataset=task["test"],
            compute_metrics=lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
            callbacks=[worst],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        metrics = trainer.evaluate()
    return {
        "test_loss": finite(metrics["eval_loss"]),
        "test_accuracy": metrics["eval_accuracy"],
        "worst_train_loss": finite(worst.value),
        "seconds": round(time.perf_counter() - started, 2),
    }


def finite(value: float) -> float | None:
    """Return the value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def fine_tune(
    pretrained: torch.nn.Module, task: dict[str, Any], *, seed: int, steps: int, **options: Any
) -> dict[str, Any]:
    """Give a copy of the pretrained model a new head and train LoRA on it."""
    set_seed(seed)
    model = copy.deepcopy(pretrained)
    model.classifier.reset_parameters()
    with warnings.catch_warnings():  # PEFT reads a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    return train(adapted, task, seed=seed, steps=steps, **options)


def failed(run: dict[str, Any]) -> bool:
    """Say whether a run ended no better than chance."""
    return run["test_loss"] is None or run["test_loss"] >= CHANCE


def table(runs: list[dict[str, Any]]) -> str:
    """Return a Markdown table: mean test accuracy, and how many of the seeds failed."""
    rates = sorted({run["learning_rate"] for run in runs})
    rows = [f"| | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for name in OPTIMIZERS:
        cells = []
        for rate in rates:
            cell = [r for r in runs if r["optimizer"] == name and r["learning_rate"] == rate]
            accuracy = sum(run["test_accuracy"] for run in cell) / len(cell)
            misses = sum(map(failed, cell))
            cells.append(f"{accuracy:.2f}" + (f" ({misses} of {len(cell)} fail)" * bool(misses)))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Run all of it, print the table, and write every run to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    rates, seeds = (RATES[::3], SEEDS[:1]) if args.quick else (RATES, SEEDS)
    steps, pretraining_steps = (3, 5) if args.quick else (STEPS, PRETRAINING_STEPS)

    first, second = load_tasks()
    set_seed(0)
    pretrained = make_model()
    start = train(pretrained, first, seed=0, steps=pretraining_steps, learning_rate=1e-3)
    print(f"pretrained on 0 to 4: test accuracy {start['test_accuracy']:.3f}")
    runs = []
    for name, options in OPTIMIZERS.items():
        for rate in rates:
            for seed in seeds:
                result = fine_tune(
                    pretrained, second, seed=seed, steps=steps, learning_rate=rate, **options
                )
                runs.append({"optimizer": name, "learning_rate": rate, "seed": seed, **result})
                print(json.dumps(runs[-1]), flush=True)
    print(f"\nMean test accuracy on 5 to 9 by learning rate, {len(seeds)} seeds:\n\n{table(runs)}")
    if args.output:
        content = {
            "task": "digits 0 to 4, then LoRA on 5 to 9",
            "lora": LORA,
            "tau": TAU,
            "steps": steps,
            "chance_loss": CHANCE,
            "pretraining": start,
            "versions": {
                "hf_stable": version("hf-stable"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
            "runs": runs,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a recipe's settings come to for the Trainer: its arguments and the optimizer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from recipes.settings import Settings

__all__ = ["check", "other_optimizer", "training_arguments"]


OTHER = ("pytorch_optimizer:", "torch:")
"""In front of the name of an optimizer that this package has; its options are JSON then."""

MUON = "torch:Muon"
"""For the matrices of blocks; AdamW has the rest: see `recipes.muon`."""

FEWEST_KEPT = 2
"""Checkpoints that are kept: the last, and one in case that it was not saved to its end."""


def check(settings: Settings) -> None:
    """Refuse what can be known to be wrong before any data are loaded.

    Raises:
        ValueError: if the batches of all processes do not make the global batch, one process would
            use several GPUs, or there will be no checkpoint to go back to.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 1
    if gpus > 1 and int(os.environ.get("LOCAL_RANK", -1)) < 0:
        raise ValueError(
            f"there are {gpus} GPUs and one process, which would take a batch of "
            f"{settings.batch_size} on each; start a process for each GPU, torchrun "
            f"--nproc-per-node {gpus} recipes/run.py ..., or show this one a single GPU, "
            "CUDA_VISIBLE_DEVICES=0 python recipes/run.py ..."
        )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch = settings.batch_size * settings.gradient_accumulation_steps * processes
    if settings.global_batch and batch != settings.global_batch:
        raise ValueError(
            f"{processes} processes with {settings.gradient_accumulation_steps} batches of "
            f"{settings.batch_size} make {batch} examples a step, but the recipe is for "
            f"{settings.global_batch}; set --gradient_accumulation_steps or --batch_size, or start "
            "as many processes as make it"
        )
    if settings.on_collapse == "rollback" and settings.monitor_every and not settings.save_steps:
        raise ValueError(
            "on_collapse 'rollback' goes back to a checkpoint, and save_steps 0 writes none; set "
            "--save_steps"
        )


def training_arguments(
    settings: Settings, output: Path, *, smooths: bool = True, **options: Any
) -> TrainingArguments:
    """Return the Trainer's arguments for these settings.

    Raises:
        ValueError: for what `check` refuses.
    """
    check(settings)
    other = settings.optim.startswith(OTHER)
    return TrainingArguments(
        str(output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        lr_scheduler_kwargs=settings.lr_scheduler_kwargs,
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        optim="adamw_torch" if other else settings.optim,
        optim_args=None if other else settings.optim_args,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        # A task with a loss of its own has smoothed its labels.
        label_smoothing_factor=settings.label_smoothing if smooths else 0.0,
        dataloader_num_workers=settings.workers,
        remove_unused_columns=False,  # tasks hold what is needed, for the model or to collate
        bf16=settings.bf16,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=_most_kept(settings),
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        **options,
    )


def _most_kept(settings: Settings) -> int | None:
    if settings.save_total_limit is not None:
        return settings.save_total_limit or None
    # Which checkpoint is gone back to is not known before: one from before the trouble began.
    return None if settings.on_collapse == "rollback" else FEWEST_KEPT


def other_optimizer(settings: Settings, model: Any) -> dict[str, Any]:
    """Return what the Trainer takes for an optimizer that it does not have, by name."""
    if not settings.optim.startswith(OTHER):
        return {}
    package, _, name = settings.optim.partition(":")
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    given = json.loads(settings.optim_args or "{}")
    if settings.optim == MUON:
        from recipes.muon import muon_with_adamw

        options["betas"] = (0.9, settings.adam_beta2)
        return {"optimizers": (muon_with_adamw(model, **options | given), None)}
    if package == "torch":
        kind: Any = getattr(torch.optim, name)
    else:
        import pytorch_optimizer

        kind = pytorch_optimizer.load_optimizer(name)
        options["betas"] = (0.9, settings.adam_beta2)
    return {"optimizer_cls_and_kwargs": (kind, options | given)}

"""Which DeepSpeed configs sigmaReparam and AdamW2 work under; the others are refused by name.

Pure functions on the content of a config file, so that the refusal comes before anything is cut
into pieces, and is the same on every rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["read_settings", "refuse_other_checkpoint", "refuse_unfit_settings"]

ONE_BIT = ("onebitadam", "zerooneadam", "onebitlamb")
"""Optimizers that exchange compressed updates in the place of gradients."""

Settings = Mapping[str, Any]


def read_settings(config: Any) -> Settings:
    """Return the content of a DeepSpeed config: a mapping, or the path of a JSON file."""
    if isinstance(config, str | os.PathLike):
        return dict(json.loads(Path(config).read_text()))
    return config if isinstance(config, Mapping) else {}


def refuse_unfit_settings(settings: Settings, *, is_patched: bool, uses_adamw2: bool) -> None:
    """Raise for settings under which a reparametrised model or AdamW2 cannot train.

    Args:
        settings: content of a DeepSpeed config, as `read_settings` returns it.
        is_patched: whether the model has sigma layers.
        uses_adamw2: whether AdamW2 was asked for.

    Raises:
        ValueError: naming the setting, the reason and the way out. Nothing is raised for other
            models and optimizers.
    """
    if uses_adamw2:
        _refuse_own_optimizer(settings)
    if not is_patched and not uses_adamw2:
        return
    who = "a model patched with sigma_reparam" if is_patched else "AdamW2"
    zero = settings.get("zero_optimization") or {}
    unfit = [*_unfit_ways(settings), *_unfit_partitions(zero)]
    if uses_adamw2:
        unfit += _unfit_for_adamw2(settings, zero)
    for setting, reason in unfit:
        raise ValueError(f"{who} does not train under DeepSpeed with {setting}: {reason}")


def refuse_other_checkpoint(folder: Any) -> None:
    """Raise ValueError for a checkpoint that DeepSpeed has not written, and so cannot resume.

    Args:
        folder: of the checkpoint; nothing is raised for anything but the path of a folder.
    """
    if not isinstance(folder, str | os.PathLike) or not os.path.isdir(folder):
        return
    if not any(Path(folder).glob("global_step*")):
        raise ValueError(
            f"{os.fspath(folder)} was not saved under DeepSpeed (it has no folder global_step...), "
            "and DeepSpeed resumes its own checkpoints alone. Resume it without DeepSpeed; or "
            "start anew from its weights: hf_stable.load(model_class, folder) for a patched model, "
            "from_pretrained for a plain one"
        )


def _refuse_own_optimizer(settings: Settings) -> None:
    own = settings.get("optimizer")
    if own:
        raise ValueError(
            f"the DeepSpeed config has an optimizer ({_type_of(own)!r}), which takes the place of "
            'AdamW2 without a word. Remove "optimizer" from the config: TrainingArguments('
            'optim="adamw2"), or optimizer=AdamW2(...) for deepspeed.initialize, is used then'
        )


def _unfit_ways(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield what does not fit among the ways to train, and why."""
    for precision in ("fp16", "bf16"):
        name = f"{precision}_master_weights_and_grads"
        if (settings.get(precision) or {}).get(name):
            yield (
                name,
                "without float32 master weights gamma and the weights take no small steps. Leave "
                "it out",
            )
    if _type_of(settings.get("optimizer")).lower() in ONE_BIT:
        yield (
            f"the optimizer {_type_of(settings['optimizer'])!r}",
            "1-bit optimizers move weights by compressed updates of their own, outside ZeRO. "
            "Remove it from the config",
        )
    if (settings.get("tensor_parallel") or {}).get("autotp_size", 0) > 1:
        yield "tensor_parallel", "it replaces layers by cut ones. Leave it out, ZeRO shards as well"


def _unfit_partitions(zero: Settings) -> Iterator[tuple[str, str]]:
    """Yield what does not fit in the section `zero_optimization`, and why."""
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            yield (
                f"{name} to nvme (ZeRO-Infinity)",
                "a power iteration would read every weight back from the disk at each step. "
                'Offload to "cpu"',
            )
    if zero.get("zenflow"):
        yield "zenflow", "it moves parts of the weights at other times than the step. Leave it out"
    for name, least in (("zero_hpz_partition_size", 1), ("mics_shard_size", 0)):
        if (zero.get(name) or 0) > least:
            yield name, "shards of shards are not followed. Leave it out"
    if zero.get("zero_quantized_weights"):
        yield (
            "zero_quantized_weights",
            "the forward computes with other weights than those that sigma is of. Leave it out",
        )


def _unfit_for_adamw2(settings: Settings, zero: Settings) -> Iterator[tuple[str, str]]:
    """Yield what does not fit AdamW2, which steps the partitions itself, and why."""
    accumulated = (settings.get("data_types") or {}).get("grad_accum_dtype")
    if zero.get("stage") == 1 and accumulated in ("fp32", "float32"):
        yield (
            'stage 1 and "grad_accum_dtype": "fp32"',
            "DeepSpeed has another optimizer for that, whose partitions are not followed. Use "
            "stage 2",
        )
    if zero.get("round_robin_gradients"):
        yield "round_robin_gradients", "its partitions are in another order. Leave it out"
    offload = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    if offload and settings.get("zero_force_ds_cpu_optimizer", True):
        yield (
            "offload_optimizer",
            "DeepSpeed wants its own CPU Adam there. AdamW2 runs on the CPU as well: set "
            '"zero_force_ds_cpu_optimizer": false',
        )


def _type_of(optimizer: Any) -> str:
    return str((optimizer or {}).get("type", ""))

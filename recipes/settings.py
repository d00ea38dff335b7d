"""What a recipe says: one flat set of names for YAML files and command lines."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Settings:
    """One training run; a YAML file sets any of these, the command line overrides them."""

    model: str = field(default="vit", metadata={"help": "vit, swin, linear_swin, gpt2 or bert"})
    model_config: dict[str, Any] | None = field(
        default=None, metadata={"help": "fields of the model's config, over those of its size"}
    )
    init: str = field(
        default="default", metadata={"help": "default (transformers'), xavier, truncated_xavier"}
    )
    init_scale: float = field(default=1.0, metadata={"help": "factor on all initial matrices"})
    data: str = field(
        default="digits", metadata={"help": "digits, stdlib, or a data set of the Hub"}
    )
    data_config: str | None = field(default=None, metadata={"help": "of the data set"})
    image_column: str | None = field(default=None, metadata={"help": "of the data set"})
    label_column: str | None = field(default=None, metadata={"help": "of the data set"})
    text_column: str | None = field(default=None, metadata={"help": "of the data set"})
    tokenizer: str | None = field(default=None, metadata={"help": "of a model on the Hub"})
    randaugment: int = field(default=0, metadata={"help": "magnitude; 0: none"})
    mixup: float = field(default=0.0, metadata={"help": "alpha; 0: none"})
    cutmix: float = field(default=0.0, metadata={"help": "alpha; 0: none"})
    workers: int = field(default=0, metadata={"help": "processes that load data"})
    patch: str = field(default="", metadata={"help": "methods, comma-separated"})
    patch_init: str = field(
        default="one", metadata={"help": "gamma of sigmaReparam: one, spectral"}
    )
    patch_scope: str = field(default="blocks", metadata={"help": "norms to remove: blocks, all"})
    normaliser: str = field(
        default="", metadata={"help": "in sigma's place (vit): frobenius, weight_norm"}
    )
    qk_norm: bool = field(default=False, metadata={"help": "LayerNorm on queries and keys (vit)"})

    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup: float = field(default=0.0, metadata={"help": "share of the steps"})
    weight_decay: float = 0.0
    adam_beta2: float = 0.99
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: no clipping"})
    steps: int = 250
    batch_size: int = field(default=32, metadata={"help": "of one process"})
    global_batch: int = field(
        default=0, metadata={"help": "of all, checked where given: processes x batches x steps"}
    )
    gradient_accumulation_steps: int = 1
    label_smoothing: float = 0.0
    bf16: bool = False

    monitor_every: int = field(default=10, metadata={"help": "steps from probe to probe; 0: none"})
    sharpness_every: int = field(default=0, metadata={"help": "0: never"})
    on_collapse: str = "warn"
    seed: int = 0
    threads: int = field(default=1, metadata={"help": "of torch, on a CPU; 0: as torch chooses"})
    save_steps: int = field(default=0, metadata={"help": "0: no checkpoints"})
    output: str = "recipe-output"


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a recipe sets.

    Raises:
        ValueError: for a name that no setting has.
    """
    content = yaml.safe_load(path.read_text()) or {}
    known = {each.name for each in fields(Settings)}
    if unknown := sorted(set(content) - known):
        raise ValueError(f"{path}: unknown {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
    return content

"""What a recipe says: one flat set of names for YAML files and command lines."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


class Fields(dict[str, Any]):
    """Fields by name; a command line writes them as JSON or YAML."""

    def __init__(self, given: Any = ()) -> None:
        """Take pairs, a mapping, or the text of one.

        Raises:
            argparse.ArgumentTypeError: if a text is not that of a mapping.
        """
        if isinstance(given, str):
            text = given
            try:
                given = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise argparse.ArgumentTypeError(f"{text!r} is not YAML: {error}") from error
            if not isinstance(given, dict):
                raise argparse.ArgumentTypeError(
                    f"{text!r} is not a mapping; write it as '{{\"num_hidden_layers\": 2}}'"
                )
        super().__init__(given)


@dataclass
class Settings:
    """One training run; a YAML file sets any of these, the command line overrides them."""

    model: str = field(
        default="vit",
        metadata={
            "help": "vit, swin, linear_swin, gpt2, llama, qwen3, bert, marian, t5, wav2vec2 or "
            "whisper"
        },
    )
    model_config: Fields | None = field(
        default=None, metadata={"help": "fields of the model's config, over those of its size"}
    )
    init: str = field(
        default="default", metadata={"help": "default (transformers'), xavier, truncated_xavier"}
    )
    init_scale: float = field(default=1.0, metadata={"help": "factor on all initial matrices"})
    data: str = field(
        default="digits",
        metadata={
            "help": "digits, stdlib, django, espeak, a folder with recordings and metadata.csv, or "
            "a data set of the Hub"
        },
    )
    data_config: str | None = field(default=None, metadata={"help": "of the data set"})
    image_column: str | None = field(default=None, metadata={"help": "of the data set"})
    label_column: str | None = field(default=None, metadata={"help": "of the data set"})
    text_column: str | None = field(default=None, metadata={"help": "of the data set"})
    source_column: str | None = field(
        default=None, metadata={"help": "to translate, translation.en say, where it is nested"}
    )
    target_column: str | None = field(default=None, metadata={"help": "its translations"})
    audio_column: str | None = field(
        default=None, metadata={"help": "of the data set; text_column has what is said"}
    )
    train_split: str = field(default="train", metadata={"help": "of the data set"})
    test_split: str = field(default="validation", metadata={"help": "of the data set"})
    tokenizer: str | None = field(default=None, metadata={"help": "of a model on the Hub"})
    randaugment: float = field(
        default=0.0, metadata={"help": "magnitude on timm's scale, which ends at 10; 0: none"}
    )
    randaugment_std: float = field(default=0.0, metadata={"help": "of the magnitude"})
    random_erasing: float = field(default=0.0, metadata={"help": "probability; 0: never"})
    mixup: float = field(default=0.0, metadata={"help": "alpha; 0: none"})
    cutmix: float = field(default=0.0, metadata={"help": "alpha; 0: none"})
    workers: int = field(default=0, metadata={"help": "processes that load data"})
    patch: str = field(default="", metadata={"help": "methods, comma-separated"})
    patch_init: str = field(
        default="one", metadata={"help": "gamma of sigmaReparam: one, spectral"}
    )
    patch_scope: str = field(default="blocks", metadata={"help": "norms to remove: blocks, all"})
    normaliser: str = field(
        default="", metadata={"help": "in sigma's place: frobenius, weight_norm"}
    )
    qk_norm: bool = field(default=False, metadata={"help": "LayerNorm on queries and keys (vit)"})

    intervention: Fields | None = field(
        default=None, metadata={"help": "in attention: see recipes/evidence/interventions.py"}
    )

    optim: str = field(
        default="adamw_torch_fused",
        metadata={"help": "as transformers names it, or torch:NAME, or pytorch_optimizer:NAME"},
    )
    optim_args: str | None = field(
        default=None, metadata={"help": "tau=0.004 say; JSON for those of other packages"}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "the highest"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "as transformers names it"})
    lr_scheduler_kwargs: Fields | None = field(
        default=None, metadata={"help": "as transformers' own, min_lr say"}
    )
    warmup: float = field(default=0.0, metadata={"help": "share of the steps"})
    weight_decay: float = field(default=0.0, metadata={"help": "of all but biases and norms"})
    adam_beta2: float = field(default=0.99, metadata={"help": "beta1 is 0.9"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: no clipping"})
    steps: int = field(default=250, metadata={"help": "of the optimizer"})
    batch_size: int = field(default=32, metadata={"help": "of one process"})
    global_batch: int = field(
        default=0, metadata={"help": "of all, checked where given: processes x batches x steps"}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches a step"})
    label_smoothing: float = field(default=0.0, metadata={"help": "in training, not in the test"})
    bf16: bool = field(default=False, metadata={"help": "autocast"})

    monitor_every: int = field(default=10, metadata={"help": "steps from probe to probe; 0: none"})
    sharpness_every: int = field(default=0, metadata={"help": "0: never"})
    on_collapse: str = field(default="warn", metadata={"help": "as StabilityCallback's"})
    seed: int = field(default=0, metadata={"help": "of weights and order of data"})
    threads: int = field(default=1, metadata={"help": "of torch, on a CPU; 0: as torch chooses"})
    save_steps: int = field(default=0, metadata={"help": "0: no checkpoints"})
    save_total_limit: int | None = field(
        default=None,
        metadata={
            "help": "checkpoints to keep; 0: all. Left out: 2, or all if on_collapse goes back"
        },
    )
    logging_steps: int = field(default=1, metadata={"help": "steps whose mean loss is a record"})
    output: str = field(default="recipe-output", metadata={"help": "folder of results"})


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

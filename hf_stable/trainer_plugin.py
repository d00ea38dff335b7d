"""Where pickles of `TrainingArguments(optim="adamw2")` were told to look for the name at first."""

from hf_stable.trainer.optimizer import optimizer_name as _optimizer_name

__all__ = ["_optimizer_name"]

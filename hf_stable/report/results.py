"""What stands beside a Trainer's state: results of evaluations that came after it, and the config.

The example scripts of transformers save the state and evaluate then: their accuracies are in
`eval_results.json` and `all_results.json` alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hf_stable.report.states import checkpoints_in, damage_note, read_object
from hf_stable.report.values import to_number, to_step, to_text

__all__ = ["RESULT_FILES", "loss_of_guessing", "results_beside"]

RESULT_FILES = (
    "eval_results.json",
    "test_results.json",
    "predict_results.json",
    "all_results.json",
)
"""What those scripts call them."""

PREFIXES = ("eval_", "test_", "predict_")

CLASSIFIERS = (
    "ForImageClassification",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)
"""Ends of names of models whose loss is the cross-entropy of a label among `num_labels`."""

LANGUAGE_MODELS = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")
"""Likewise, of a token among `vocab_size`."""


def results_beside(folder: Path, notes: list[str]) -> dict[str, float]:
    """Return the metrics of evaluations and predictions in the files beside a state.

    Args:
        folder: of the run.
        notes: damaged files are added to.
    """
    found: dict[str, float] = {}
    for path in (folder / name for name in RESULT_FILES):
        if not path.is_file():
            continue
        try:
            content = read_object(path)
        except (OSError, ValueError) as error:
            notes.append(damage_note(path, error))
            continue
        for key, value in content.items():
            if key.startswith(PREFIXES) and math.isfinite(to_number(value)):
                found.setdefault(to_text(key), to_number(value))
    return found


def loss_of_guessing(folder: Path) -> float | None:
    """Return the cross-entropy of guessing among all labels or tokens, as a saved config has them.

    Args:
        folder: of the run, or a checkpoint.

    Returns:
        Nats; None where there is no config, or none of a model whose loss is known to be that.
    """
    for place in (folder, *checkpoints_in(folder)):
        try:
            config = read_object(place / "config.json")
        except (OSError, ValueError):
            continue
        return _guessing(config)
    return None


def _guessing(config: dict[str, Any]) -> float | None:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    count = None
    if name.endswith(CLASSIFIERS):
        # transformers writes the names of labels, and their number where they have none.
        labels = config.get("id2label")
        count = len(labels) if isinstance(labels, dict) else to_step(config.get("num_labels", 2))
        if config.get("problem_type") not in (None, "single_label_classification"):
            return None
    elif name.endswith(LANGUAGE_MODELS):
        count = to_step(config.get("vocab_size"))
    return math.log(count) if count is not None and count > 1 else None

"""Model cards in the Hub's format: what was done to a model, how to load it, how it was trained.

A card that is there already is kept. Only the section between two comments is ours to rewrite.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from transformers.modelcard import METRIC_TAGS, make_markdown_table

from hf_stable._json import to_json
from hf_stable.checkpoints.provenance import TrainingRecord, base_model_of
from hf_stable.methods.config import folded_methods
from hf_stable.methods.layernorms.removal import needs_standalone_form
from hf_stable.methods.layernorms.standalone import AUTO_CLASSES, is_standalone, removed_by_class
from hf_stable.methods.patching import patch_configs
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.modeling_hf_stable import CLASS_PREFIX

__all__ = ["amend_card", "read_card"]

_SPECIAL = re.compile(r"([\[\]|`])")

START, END = "<!-- hf_stable: start -->", "<!-- hf_stable: end -->"

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
}
"""The Hub's pipeline tag of a model, by the auto class that loads it."""

PAPERS = """\
- Zhai et al., [Stabilizing Transformer Training by Preventing Attention Entropy Collapse](\
https://arxiv.org/abs/2303.06296), 2023: sigmaReparam, training without LayerNorm
- Qi et al., [Taming Transformer Without Using Learning Rate Warmup](\
https://arxiv.org/abs/2505.21910), 2025: AdamW2"""


def read_card(path: str | os.PathLike[str], name: str | None = None) -> ModelCard:
    """Read a card that is to be amended.

    Args:
        path: the file.
        name: what to call it in an error, where it is a copy.

    Raises:
        ValueError: if it is no card in the Hub's format.
        OSError: if it cannot be read.
    """
    try:
        return ModelCard.load(Path(path))
    except OSError:
        raise
    except Exception as error:  # of YAML, of its encoding, or of what stands in it
        reason, path = " ".join(str(error).split()), name or os.fspath(path)
        raise ValueError(
            f"{path} is there already and is no model card that could be amended "
            f"({reason}). Give it a header of 'key: value' lines between two lines of '---', in "
            "UTF-8, or remove it"
        ) from error


def amend_card(
    card: ModelCard | None,
    model: Any,
    *,
    name: str,
    training: TrainingRecord | None = None,
    picture: str | None = None,
) -> ModelCard:
    """Add to a card, or to a new one, what hf_stable knows of a model.

    Header fields that are set stay, tags and metrics are joined. In the body, our own section is
    replaced, or appended where there is none.

    Args:
        card: the card that is there already.
        model: a model of transformers, patched or not.
        name: what the model is loaded by: the repository's id, or the name of a folder.
        training: what is known of its training.
        picture: name of a file beside the card that shows the training's curves.

    Returns:
        The card; the one that was given is changed.
    """
    training = training or TrainingRecord()
    if card is None:
        header = ModelCardData().to_yaml()
        card = ModelCard(f"---\n{header}\n---\n\n# {_plain(name.rpartition('/')[2])}\n")
    _amend_header(card.data, model, training)
    section = f"{START}\n{_section(model, name, training, picture)}\n{END}\n"
    ours = re.compile(rf"{re.escape(START)}.*?{re.escape(END)}\n?", re.DOTALL)
    if ours.search(card.text):
        card.text = ours.sub(lambda _: section, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}"
    return card


def _amend_header(data: Any, model: Any, training: TrainingRecord) -> None:
    methods = [config.method for config in patch_configs(model)]
    data.tags = _joined(data.tags, ["hf_stable", *methods, *folded_methods(model)])
    if metrics := [tag for tag in METRIC_TAGS if tag in training.metrics]:
        data.metrics = _joined(data.metrics, metrics)
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or PIPELINES.get(_auto_class(model) or "")
    data.base_model = data.base_model or base_model_of(model)


def _joined(given: str | list[str] | None, new: Iterable[str]) -> list[str]:
    given = [given] if isinstance(given, str) else given or []
    return list(dict.fromkeys([*given, *new]))


def _auto_class(model: nn.Module) -> str | None:
    """Return the auto class that loads a model's own class, a task's before a general one."""
    config = getattr(model, "config", None)  # a module that only holds a model has none
    for name in sorted(AUTO_CLASSES, key=lambda name: name not in PIPELINES):
        if getattr(transformers, AUTO_CLASSES[name]).get(type(config), None) is type(model):
            return name
    return None


def _section(model: Any, name: str, training: TrainingRecord, picture: str | None) -> str:
    parts = [
        f"## Trained with hf_stable\n\n{_changes(model)}",
        f"### How to load it\n\n```python\n{_loading(model, name)}\n```",
    ]
    if training.settings:
        settings = training.settings.items()
        rows = "\n".join(f"- {_plain(key)}: {_shown(value)}" for key, value in settings)
        parts.append(f"### Training\n\n{rows}")
    if training.metrics:
        table = make_markdown_table(
            [
                {"metric": _plain(key), "value": _shown(value)}
                for key, value in training.metrics.items()
            ]
        )
        parts.append(f"### Final metrics\n\n{table.rstrip()}")
    if picture:
        parts.append(f"### Curves\n\n![Loss and attention entropy over steps]({picture})")
    versions = f"hf_stable {version('hf-stable')}, transformers {transformers.__version__}"
    parts.append(f"### Versions\n\n{versions}, torch {torch.__version__}")
    parts.append(f"### Papers\n\n{PAPERS}")
    return "\n\n".join(parts)


def _changes(model: Any) -> str:
    """Say in sentences what differs from the model that transformers builds."""
    lines = [f"A `{type(model).__name__.removeprefix(CLASS_PREFIX)}`."]
    if layers := sigma_layers(model):
        lines.append(
            f"{len(layers)} layers were trained with sigmaReparam, `gamma / sigma(W) * W`; the "
            "product is multiplied out in the weights here, so they are plain layers."
        )
    if is_standalone(model) or needs_standalone_form(model):
        norms = "; ".join(
            f"{_code(path)} of every {_code(owner)}"
            for owner, paths in removed_by_class(model).items()
            for path in paths
        )
        lines.append(
            f"These LayerNorms are removed: {norms}. Its own code, `modeling_hf_stable.py`, leaves "
            "them out; the classes of transformers refuse this config, for they would bring them "
            "back."
        )
    if configs := patch_configs(model):
        lines.append(f"Patched with {', '.join(map(_code, configs))}.")
    if folded := folded_methods(model):
        lines.append(
            f"Trained with {', '.join(map(_code, folded.values()))} and folded: "
            "what sigmaReparam scales is multiplied out, so the layers are plain ones."
        )
    return "\n".join(lines)


def _loading(model: Any, name: str) -> str:
    path = to_json(name).replace("<", "\\u003c")  # no comment that could be taken for ours
    own_class, auto_class = type(model).__name__.removeprefix(CLASS_PREFIX), _auto_class(model)
    if not isinstance(model, PreTrainedModel):
        return (
            "from safetensors.torch import load_file\n\n"
            f"model = {own_class}(...)  # built as it was for the training, but not patched\n"
            'model.load_state_dict(load_file("model.safetensors"))'
        )
    if not (is_standalone(model) or needs_standalone_form(model)):
        loader = auto_class or own_class
        return f"from transformers import {loader}\n\nmodel = {loader}.from_pretrained({path})"
    if auto_class is None:
        loader = f"{CLASS_PREFIX}{own_class}"
        return (
            f"from hf_stable.modeling_hf_stable import {loader}\n\n"
            f"model = {loader}.from_pretrained({path})"
        )
    return (
        f"from transformers import {auto_class}\n\n"
        f"model = {auto_class}.from_pretrained({path}, trust_remote_code=True)\n"
        "# not needed after `import hf_stable`: trust_remote_code"
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _plain(str(value))


def _plain(text: str) -> str:
    """Return a text of someone else as Markdown that shows it: no HTML, comment, link or column."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _code(value: Any) -> str:
    """Return a text of someone else as code within a line, which it cannot end, nor our section."""
    line = " ".join(str(value).split()).replace("`", "'").replace("<!--", "<! --")
    return f"`{line}`"

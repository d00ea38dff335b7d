"""The form in which a model without LayerNorms is saved, and how it comes back.

A plain folder would bring the norms back without a word. This one has a model_type of its own, the
file `modeling_hf_stable.py` beside the weights, and a sentence in config.json that the classes of
transformers stumble over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig

from hf_stable import modeling_hf_stable
from hf_stable.architectures.finding import find_regions, norm_paths
from hf_stable.architectures.registry import (
    UnsupportedModelError,
    architecture_of,
    model_type_of,
    supported_architectures,
)
from hf_stable.modeling_hf_stable import CLASS_PREFIX, locate_norms

__all__ = [
    "AUTO_CLASSES",
    "is_standalone",
    "register_auto_classes",
    "removed_by_class",
    "standalone_class",
    "standalone_config",
    "standalone_form",
]

AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForPreTraining": "MODEL_FOR_PRETRAINING_MAPPING",
    "AutoModelForTextEncoding": "MODEL_FOR_TEXT_ENCODING_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
    "AutoModelForNextSentencePrediction": "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "AutoModelForMaskedImageModeling": "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING",
    "AutoBackbone": "MODEL_FOR_BACKBONE_MAPPING",
}
"""The auto classes of transformers for text and images, and the table each of them looks in."""


def is_standalone(model: nn.Module) -> bool:
    """Say whether the model is of a class of `modeling_hf_stable`, imported or from a folder."""
    return type(model).__name__.startswith(CLASS_PREFIX)


def standalone_class(native: Any) -> Any:
    """Return the class without norms that is derived from a model class of transformers.

    Raises:
        UnsupportedModelError: for a class that is not one of transformers' own.
    """
    try:
        return getattr(
            modeling_hf_stable, CLASS_PREFIX + native.__name__.removeprefix(CLASS_PREFIX)
        )
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{native.__name__} is no model class of transformers, so there is none without norms "
            "that is derived from it"
        ) from error


def standalone_config(model: Any) -> Any:
    """Return the config under which a model without norms is saved; the model's stays as it is.

    Raises:
        UnsupportedModelError: if the model's architecture is not registered (a patched model
            inside another one).
    """
    if architecture_of(model) is None:
        raise UnsupportedModelError(
            f"the norms of a part of this {type(model).__name__} were removed, and a model without "
            f"norms is saved under a name of its own, which model_type {model_type_of(model)!r} "
            "has none of: it is not registered. Save the part, or hf_stable.restore_layernorms"
        )
    removed, native = removed_by_class(model), model.config
    config = standalone_class(type(native)).from_dict(native.to_dict())
    config.removed_layernorms = removed
    config.auto_map = _auto_map(type(native))
    return config


@contextmanager
def standalone_form(model: Any) -> Iterator[None]:
    """Let `save_pretrained` write the standalone form inside this context.

    The config is what decides: saving it writes the guard and the modeling file.
    """
    native = model.config
    model.config = standalone_config(model)
    try:
        yield
    finally:
        model.config = native


def register_auto_classes() -> None:
    """Let the auto classes load models without norms in this process, without remote code.

    An architecture that is a user's own has no class in transformers to derive one from.
    """
    for model_type in supported_architectures():
        if model_type not in transformers.CONFIG_MAPPING:
            continue
        native_config = transformers.CONFIG_MAPPING[model_type]
        config_class = standalone_class(native_config)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, native in _native_classes(native_config).items():
            getattr(transformers, auto_class).register(
                config_class, standalone_class(native), exist_ok=True
            )


def _auto_map(native_config: Any) -> dict[str, str]:
    module = modeling_hf_stable.__name__.rpartition(".")[2]
    classes = {"AutoConfig": native_config, **_native_classes(native_config)}
    return {auto: f"{module}.{standalone_class(cls).__name__}" for auto, cls in classes.items()}


def _native_classes(native_config: Any) -> dict[str, Any]:
    """Map the name of each auto class that knows a config to the class it would load."""
    if native_config.__name__.startswith(CLASS_PREFIX):
        native_config = native_config.__base__
    found = {
        auto_class: getattr(transformers, table).get(native_config, None)
        for auto_class, table in AUTO_CLASSES.items()
    }
    return {auto_class: native for auto_class, native in found.items() if native is not None}


def removed_by_class(model: Any) -> dict[str, list[str]]:
    """Return what of a model's norms is gone, by the class that has it and the path in it."""
    declared: list[tuple[str, str]] = []
    for region in find_regions(model):
        for block in region.architecture.blocks:
            paths = (path for paths in norm_paths(block).values() for path in paths)
            declared += [(block.class_name, path) for path in paths]
        declared += [(member.class_name, member.path) for member in region.architecture.norms]
    removed: dict[str, list[str]] = {}
    for class_name, path in dict.fromkeys(declared):
        owners = locate_norms(model, {class_name: [path]})
        if any(isinstance(owner.get_submodule(path), nn.Identity) for owner, _ in owners):
            removed.setdefault(class_name, []).append(path)
    return removed

"""The form in which a model without LayerNorms is saved, and how it comes back.

A plain folder would bring the norms back without a word. This one has a model_type of its own, the
file `modeling_hf_stable.py` beside the weights, and a sentence in config.json that the classes of
transformers stumble over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
from hf_stable.modeling_hf_stable import CLASS_PREFIX, guarded_field, locate_norms

__all__ = [
    "AUTO_CLASSES",
    "config_without_norms",
    "is_standalone",
    "register_auto_classes",
    "removed_by_class",
    "standalone_class",
    "standalone_config",
    "standalone_form",
]

_IRREGULAR = {
    "AutoBackbone": "MODEL_FOR_BACKBONE_MAPPING",
    "AutoModelForAudioXVector": "MODEL_FOR_AUDIO_XVECTOR_MAPPING",
    "AutoModelForPreTraining": "MODEL_FOR_PRETRAINING_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
}


def _table_of(auto_class: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", auto_class.removeprefix("Auto")).upper()
    return _IRREGULAR.get(auto_class, f"{words}_MAPPING")


AUTO_CLASSES = {
    name: _table_of(name)
    for name in dir(transformers)
    if (name.startswith("AutoModel") or name in _IRREGULAR)
    and hasattr(transformers, _table_of(name))
}
"""The auto classes of transformers, and the table that each of them looks in."""


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
    if architecture_of(model) is None or not _can_be_guarded(type(model.config)):
        raise UnsupportedModelError(
            f"the norms of a part of this {type(model).__name__} were removed, and a model without "
            f"norms is saved under a name of its own, which model_type {model_type_of(model)!r} "
            "has none of: it is not registered, or its config has no number in whose place a "
            "sentence could stand. Save the part, or hf_stable.restore_layernorms"
        )
    removed, native = removed_by_class(model), model.config
    config = standalone_class(type(native)).from_dict(native.to_dict())
    config.removed_layernorms = removed
    config.auto_map = _auto_map(type(native), [type(model).__name__])
    return config


def config_without_norms(given: Any, own: Any) -> Any:
    """Return a config that a user gives for a model without norms, with what is removed from it.

    Args:
        given: of the architecture's own class, or of `own`'s.
        own: the config in the model's folder.

    Raises:
        ValueError: if the two are of different architectures.
    """
    if isinstance(given, type(own)):
        return given
    if not isinstance(own, type(given)):
        raise ValueError(
            f"config is a {type(given).__name__}, but the model was saved with a "
            f"{type(own).__name__}; give one of its class, or leave it out"
        )
    config = type(own).from_dict(given.to_dict())
    config.removed_layernorms, config.auto_map = own.removed_layernorms, own.auto_map
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
        if model_type in transformers.CONFIG_MAPPING:
            config_class = transformers.CONFIG_MAPPING[model_type]
            if _can_be_guarded(config_class):
                own = standalone_class(config_class)
                AutoConfig.register(own.model_type, own, exist_ok=True)
    # Models are derived when a config asks for them: to load all would take longer than torch does.
    modeling_hf_stable.ON_CONFIG[:] = [_register_models]


def _can_be_guarded(config_class: Any) -> bool:
    try:
        guarded_field(config_class)
    except TypeError:
        return False
    return True


def _register_models(config: Any) -> None:
    for auto_class, native in _native_classes(type(config), config.architectures).items():
        own = standalone_class(native)
        getattr(transformers, auto_class).register(type(config), own, exist_ok=True)


def _auto_map(native_config: Any, architectures: Sequence[str] | None) -> dict[str, str]:
    module = modeling_hf_stable.__name__.rpartition(".")[2]
    classes = {"AutoConfig": native_config, **_native_classes(native_config, architectures)}
    return {auto: f"{module}.{standalone_class(cls).__name__}" for auto, cls in classes.items()}


def _native_classes(native_config: Any, architectures: Sequence[str] | None) -> dict[str, Any]:
    """Map the name of each auto class that knows a config to the class it would load.

    Of several classes it loads the one that the config names, else the first.
    """
    if native_config.__name__.startswith(CLASS_PREFIX):
        native_config = native_config.__base__
    named = [name.removeprefix(CLASS_PREFIX) for name in architectures or ()]
    found = {}
    for auto_class, table in AUTO_CLASSES.items():
        known = getattr(transformers, table).get(native_config, None)
        known = known if isinstance(known, tuple) else (known,)
        native = next((cls for cls in known if cls and cls.__name__ in named), known[0])
        # A table may hold the model of another config for it (vision tasks of text models).
        if native is not None and native.config_class is native_config:
            found[auto_class] = native
    return found


def removed_by_class(model: Any) -> dict[str, list[str]]:
    """Return what of a model's norms is gone, by the class that has it and the path in it.

    Raises:
        UnsupportedModelError: if blocks of one class differ in this: a folder could not tell them
            apart, and all of them would be loaded without the norm.
    """
    declared: list[tuple[str, str]] = []
    for region in find_regions(model):
        for block in region.architecture.blocks:
            paths = (path for paths in norm_paths(block).values() for path in paths)
            declared += [(block.class_name, path) for path in paths]
        declared += [(member.class_name, member.path) for member in region.architecture.norms]
    removed: dict[str, list[str]] = {}
    for class_name, path in dict.fromkeys(declared):
        owners = locate_norms(model, {class_name: [path]})
        gone = [isinstance(owner.get_submodule(path), nn.Identity) for owner, _ in owners]
        if any(gone) and not all(gone):
            raise UnsupportedModelError(
                f"{sum(gone)} of {len(gone)} {class_name} have lost their {path}, the others have "
                "it: a folder could say this of all of them alone. Call hf_stable.patch on the "
                "whole model with the config of the removal, or hf_stable.restore_layernorms"
            )
        if any(gone):
            removed.setdefault(class_name, []).append(path)
    return removed

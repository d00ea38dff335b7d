"""Models as a config.json describes them: the class that it names, and the model without memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_stable import modeling_hf_stable
from hf_stable._json import from_json
from hf_stable.modeling_hf_stable import CLASS_PREFIX

__all__ = [
    "empty_base_model",
    "empty_model",
    "implementations",
    "named_class",
    "read_config",
    "read_content",
]

Source = str | os.PathLike[str]
Revise = Callable[[dict[str, Any]], dict[str, Any]]

_IMPLEMENTATIONS = tuple(
    f"{mark}{what}_implementation{end}"
    for what in ("attn", "experts")
    for mark, end in (("", ""), ("_", ""), ("_", "_internal"))
)
"""The keys by which a config.json can choose code; `save_pretrained` writes none of them."""


def named_class(config: PreTrainedConfig, source: Source) -> type[PreTrainedModel]:
    """Return the model class that a config names first under `architectures`.

    Args:
        config: of transformers, or of `modeling_hf_stable`.
        source: where it comes from, for the error.

    Raises:
        ValueError: if it names none, or one that transformers does not have.
    """
    names: Any = config.architectures
    name = str(names[0]) if isinstance(names, list | tuple) and names else ""
    holder = modeling_hf_stable if name.startswith(CLASS_PREFIX) else transformers
    found = getattr(holder, name, None)
    # A base class has no weights. Building `PreTrainedModel` itself would also mark it as able to
    # set an experts implementation, which every class that is built for the first time inherits.
    is_base = name.endswith("PreTrainedModel")
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and not is_base:
        return found
    raise ValueError(
        f"{_path_of(source)} has {names!r} under 'architectures', whose first "
        "entry is no model class of transformers. Give the config of the model that was trained, "
        "head included, or load the model in Python with its own class"
    )


def read_config(source: Source, revise: Revise = lambda content: content) -> PreTrainedConfig:
    """Read a config without the implementations of attention and experts that it asks for.

    These may name a kernel on the Hub, which would be fetched and run. Code that lies beside a
    config is neither run nor asked about.

    Args:
        source: folder, file or name on the Hub of a config.json.
        revise: called with what stands in it, returns what counts, or refuses it (ValueError).

    Raises:
        OSError: if there is no such config.
        ValueError: if it is damaged, or of no model of transformers.
    """
    content = revise(read_content(source))
    model_type = content.get("model_type")
    try:
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            return AutoConfig.from_pretrained(source, trust_remote_code=False)  # says what it lacks
        return CONFIG_MAPPING[model_type].from_dict(_without_implementations(content))
    except Exception as error:  # which one an impossible value raises is up to the class
        raise ValueError(_no_model(source, error)) from error


def implementations(source: Source) -> list[str]:
    """Return the implementations of attention and experts that a config asks for, Hub or not."""
    return sorted(set(_named_implementations(read_content(source))))


def empty_model(source: Source, revise: Revise = lambda content: content) -> PreTrainedModel:
    """Build the model of a config without memory for its weights, on the device "meta".

    Args:
        source: folder, file or name on the Hub of a config.json.
        revise: as in `read_config`.

    Raises:
        ValueError: if it names no class of transformers under `architectures`, or describes no
            model that can be built.
        OSError: if there is no such config.
    """
    config = read_config(source, revise)
    return _build(named_class(config, source), config, source)


def empty_base_model(source: Source) -> PreTrainedModel:
    """Build the headless model of a config, which need name no class, as `empty_model` does.

    Raises:
        ValueError: if it describes no model that can be built.
        OSError: if there is no such config.
    """
    config = read_config(source)
    return _build(MODEL_MAPPING[type(config)], config, source)


def _build(model_class: Any, config: PreTrainedConfig, source: Source) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # as above
        raise ValueError(_no_model(source, error)) from error


def _no_model(source: Source, error: Exception) -> str:
    reason = shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
    return f"{_path_of(source)} describes no model that transformers can build: {reason}"


def _path_of(source: Source) -> str:
    return os.path.join(source, "config.json") if os.path.isdir(source) else os.fspath(source)


def read_content(source: Source) -> dict[str, Any]:
    """Return what stands in a config.json.

    Raises:
        OSError: if there is none.
        ValueError: if it is damaged.
    """
    path = _path_of(source)
    if not os.path.isfile(path):
        return PreTrainedConfig.get_config_dict(source)[0]  # on the Hub, or an error that says so
    try:
        with open(path, encoding="utf-8") as file:
            content = from_json(file.read())
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is damaged: {error}") from error
    return content


def _without_implementations(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            key: _without_implementations(value)
            for key, value in content.items()
            if key not in _IMPLEMENTATIONS
        }
    return content


def _named_implementations(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in _IMPLEMENTATIONS:
                yield from _named_implementations(value)
            elif value is not None:
                yield repr(value)

"""Models as a config.json describes them: the class that it names, and the model without memory."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_stable import modeling_hf_stable
from hf_stable._wording import shortened
from hf_stable.modeling_hf_stable import CLASS_PREFIX

__all__ = [
    "build_empty",
    "config_of",
    "empty_base_model",
    "empty_model",
    "named_class",
    "read_content",
]

Source = str | os.PathLike[str]


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
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    raise ValueError(
        f"the config in {os.fspath(source)!r} has {shortened(names)} under 'architectures', whose "
        "first entry is no model class of transformers. Give the config of the model that was "
        "trained, head included, or load the model in Python with its own class"
    )


def read_content(source: Source) -> dict[str, Any]:
    """Read a config as plain data, without what would have other people's code run.

    Neither code that lies beside it nor a kernel on the Hub that it names plays a part when a model
    is only looked at.

    Args:
        source: folder, file or name on the Hub of a config.json.

    Raises:
        ValueError: if it is no config.
        OSError: if there is none.
    """
    content, _ = PreTrainedConfig.get_config_dict(source)
    return _without_code(content)


def config_of(content: dict[str, Any], source: Source) -> PreTrainedConfig:
    """Return the config object of a config's content.

    Raises:
        ValueError: if transformers does not know its model type.
    """
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"the config in {os.fspath(source)!r} has {shortened(model_type)} under 'model_type', "
            f"which transformers {transformers.__version__} does not know"
        )
    return CONFIG_MAPPING[model_type].from_dict(content)


def empty_model(source: Source) -> PreTrainedModel:
    """Build the model of a config without memory for its weights, on the device "meta".

    Args:
        source: folder, file or name on the Hub of a config.json.

    Raises:
        ValueError: if it names no class of transformers under `architectures`.
        OSError: if there is no such config.
    """
    return build_empty(config_of(read_content(source), source), source)


def build_empty(config: PreTrainedConfig, source: Source) -> PreTrainedModel:
    """Build the model that a config names, as `empty_model` does.

    Raises:
        ValueError: if it names no class of transformers under `architectures`.
    """
    model_class = named_class(config, source)
    with torch.device("meta"):
        return model_class(config)


def empty_base_model(source: Source) -> PreTrainedModel:
    """Build the headless model of a config, which names no class, as `empty_model` does.

    Raises:
        ValueError: if transformers does not know its model type.
        OSError: if there is no such config.
    """
    with torch.device("meta"):
        return AutoModel.from_config(config_of(read_content(source), source))


_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "auto_map")


def _without_code(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_code(value) for key, value in content.items() if key not in _CODE}
    return [_without_code(value) for value in content] if isinstance(content, list) else content

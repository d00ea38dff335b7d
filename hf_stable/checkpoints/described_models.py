"""Models as a config.json describes them: the class that it names, and the model without memory."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_stable import modeling_hf_stable
from hf_stable.modeling_hf_stable import CLASS_PREFIX

__all__ = ["empty_base_model", "empty_model", "named_class"]

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
        f"the config in {os.fspath(source)!r} has {names!r} under 'architectures', whose first "
        "entry is no model class of transformers. Give the config of the model that was trained, "
        "head included, or load the model in Python with its own class"
    )


def empty_model(source: Source) -> PreTrainedModel:
    """Build the model of a config without memory for its weights, on the device "meta".

    Args:
        source: folder, file or name on the Hub of a config.json.

    Raises:
        ValueError: if it names no class of transformers under `architectures`.
        OSError: if there is no such config.
    """
    # Code that lies beside a config is neither run nor asked about: this only looks.
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    model_class = named_class(config, source)
    with torch.device("meta"):
        return model_class(config)


def empty_base_model(source: Source) -> PreTrainedModel:
    """Build the headless model of a config, which names no class, as `empty_model` does.

    Raises:
        OSError: if there is no such config.
    """
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(source, trust_remote_code=False))

"""What the costs of a model depend on: numbers of blocks and parameters, shapes of matrices.

Read off a model's weights, so a model without memory (on "meta") will do.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_stable.adamw2.groups import parameter_rules
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.measures.matrices import shapes_of
from hf_stable.measures.parts import WHOLE
from hf_stable.methods.sigma_reparam.method import SigmaReparamConfig
from hf_stable.methods.sigma_reparam.planning import choose_layers

__all__ = ["ModelShape", "measure_shape"]

_INDEX = re.compile(r"\.\d+\.")
"""What the names of parameters in a list of blocks have."""


@dataclass(frozen=True)
class ModelShape:
    """What the costs depend on.

    Attributes:
        name: class of the model.
        num_parameters: all of them.
        in_blocks: those of the repeated blocks.
        multiplied: entries of the weights that every token is multiplied with.
        bounded: (rows, columns) of the blocks that AdamW2 takes a spectral norm of.
        patched: those of the layers that sigmaReparam patches.
        layers: blocks of the model.
        hidden: its width.
        sequence: tokens that attend to each other.
        is_registered: whether the patched layers are those of the registry. Otherwise they are all
            Linear layers but the head, which is what a registration would name.
    """

    name: str
    num_parameters: int
    in_blocks: int
    multiplied: int
    bounded: tuple[tuple[int, int], ...]
    patched: tuple[tuple[int, int], ...]
    layers: int
    hidden: int
    sequence: int
    is_registered: bool


def measure_shape(model: PreTrainedModel, sequence: int | None = None) -> ModelShape:
    """Read off a model, on any device, what its costs depend on.

    Args:
        model: a PreTrainedModel.
        sequence: tokens per sequence; by default what its config says at most.
    """
    config: Any = model.config
    rules = parameter_rules(model)
    bounded = [
        shape
        for param in model.parameters()
        if not math.isinf((rule := rules.get(id(param), {})).get("tau", 0.0))
        for shape in shapes_of(param.shape, rule.get("parts", WHOLE))
    ]
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, nn.Linear | Conv1D | nn.Conv2d)
    ]
    try:
        found = choose_layers(model, SigmaReparamConfig())[0]
        chosen: list[Any] = [layer.module for layer in found]
        is_registered = True
    except UnsupportedModelError:
        head = model.get_output_embeddings()
        chosen, is_registered = [layer for layer in layers if layer is not head], False
    patched = []
    for layer in chosen:
        parts = rules.get(id(layer.weight), {}).get("parts", WHOLE)
        patched += shapes_of(layer.weight.shape, parts)
    return ModelShape(
        name=type(model).__name__,
        num_parameters=sum(param.numel() for param in model.parameters()),
        in_blocks=sum(
            param.numel() for name, param in model.named_parameters() if _INDEX.search(name)
        ),
        multiplied=sum(layer.weight.numel() for layer in layers),
        bounded=tuple(bounded),
        patched=tuple(patched),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        sequence=sequence or _longest(config),
        is_registered=is_registered,
    )


def _longest(config: Any) -> int:
    length = getattr(config, "max_position_embeddings", None)
    if length:
        return int(length)
    if getattr(config, "window_size", None):
        return int(config.window_size) ** 2
    return (int(config.image_size) // int(config.patch_size)) ** 2 + 1

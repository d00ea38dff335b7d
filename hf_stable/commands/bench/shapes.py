"""What the costs of a model depend on: numbers of blocks and parameters, shapes of matrices.

Read off a model's weights, so a model without memory (on "meta") will do.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_stable.adamw2.groups import parameter_groups, parameter_rules
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.measures.matrices import shapes_of
from hf_stable.measures.parts import WHOLE, Parts
from hf_stable.methods.sigma_reparam.method import SigmaReparamConfig
from hf_stable.methods.sigma_reparam.planning import choose_layers

__all__ = ["ModelShape", "WeightShape", "measure_shape"]

_INDEX = re.compile(r"\.\d+\.")
"""What the names of parameters in a list of blocks have."""


class WeightShape(NamedTuple):
    """One parameter, and the matrices in it.

    Attributes:
        number: in the order of the model.
        numel: its entries.
        width: entries of one of its rows.
        matrices: (rows, columns) of each that has a spectral norm; none where nobody asks.
    """

    number: int
    numel: int
    width: int
    matrices: tuple[tuple[int, int], ...]

    @property
    def vectors(self) -> int:
        """Entries of the singular vectors of its matrices, left and right."""
        return sum(map(sum, self.matrices))


@dataclass(frozen=True)
class ModelShape:
    """What the costs depend on.

    Attributes:
        name: class of the model.
        num_parameters: all of them.
        in_blocks: those of the repeated blocks.
        multiplied: entries of the weights that every token is multiplied with.
        groups: parameters as `parameter_groups` has them, with the matrices that AdamW2 bounds.
        reparametrised: weights of the layers that sigmaReparam patches.
        layers: blocks of the model.
        heads: of attention, in all blocks.
        hidden: its width.
        sequence: tokens that attend to each other.
        is_registered: whether the patched layers are those of the registry. Otherwise they are all
            Linear layers but the head, which is what a registration would name.
    """

    name: str
    num_parameters: int
    in_blocks: int
    multiplied: int
    groups: tuple[tuple[WeightShape, ...], ...]
    reparametrised: tuple[WeightShape, ...]
    layers: int
    heads: int
    hidden: int
    sequence: int
    is_registered: bool

    @property
    def weights(self) -> tuple[WeightShape, ...]:
        """All parameters in the order of the model."""
        return tuple(sorted(weight for group in self.groups for weight in group))

    @property
    def bounded(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the matrices that AdamW2 takes a spectral norm of."""
        return tuple(m for group in self.groups for weight in group for m in weight.matrices)

    @property
    def patched(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of those of the layers that sigmaReparam patches."""
        return tuple(m for weight in self.reparametrised for m in weight.matrices)


def measure_shape(model: PreTrainedModel, sequence: int | None = None) -> ModelShape:
    """Read off a model, on any device, what its costs depend on.

    Args:
        model: a PreTrainedModel.
        sequence: tokens per sequence; by default what its config says at most.
    """
    config: Any = model.config
    rules = parameter_rules(model)
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

    numbers = {id(param): number for number, param in enumerate(model.parameters())}
    return ModelShape(
        name=type(model).__name__,
        num_parameters=sum(param.numel() for param in model.parameters()),
        in_blocks=sum(
            param.numel() for name, param in model.named_parameters() if _INDEX.search(name)
        ),
        multiplied=sum(layer.weight.numel() for layer in layers),
        groups=tuple(_group_shape(group, numbers) for group in parameter_groups(model)),
        reparametrised=tuple(
            _weight_shape(weight, Parts.of(rules.get(id(weight), {}).get("parts", WHOLE)), numbers)
            for weight in (layer.weight for layer in chosen)
        ),
        layers=config.num_hidden_layers,
        heads=_num_heads(config),
        hidden=config.hidden_size,
        sequence=sequence or _longest(config),
        is_registered=is_registered,
    )


def _group_shape(group: dict[str, Any], numbers: dict[int, int]) -> tuple[WeightShape, ...]:
    parts = None if math.isinf(group.get("tau", 0.0)) else Parts.of(group.get("parts", WHOLE))
    return tuple(_weight_shape(param, parts, numbers) for _, param in group["params"])


def _weight_shape(param: Tensor, parts: Parts | None, numbers: dict[int, int]) -> WeightShape:
    matrices = () if parts is None else tuple(shapes_of(param.shape, parts))
    return WeightShape(numbers[id(param)], param.numel(), math.prod(param.shape[1:]), matrices)


def _num_heads(config: Any) -> int:
    """Return the number of heads in all blocks; Swin has another one in each stage."""
    if isinstance(heads := getattr(config, "num_heads", None), list | tuple):
        return sum(depth * each for depth, each in zip(config.depths, heads, strict=True))
    return int(config.num_attention_heads) * int(config.num_hidden_layers)


def _longest(config: Any) -> int:
    length = getattr(config, "max_position_embeddings", None)
    if length:
        return int(length)
    if getattr(config, "window_size", None):
        return int(config.window_size) ** 2
    return (int(config.image_size) // int(config.patch_size)) ** 2 + 1

"""How names and tensors on disk become those of a model, as `from_pretrained` has it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["key_renaming", "state_conversion"]


def key_renaming(
    model: PreTrainedModel, conversions: Sequence[Any] | None = None
) -> Callable[[str], str]:
    """Return the function from a key on disk to its name in the model.

    Args:
        model: of transformers; it may lie on the meta device.
        conversions: those that the model was loaded with; by default those of its architecture.
    """
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    prefix, names = model.base_model_prefix, model.state_dict()
    return lambda key: rename_source_key(key, renamings, [], prefix, names)[0]


def state_conversion(
    model: PreTrainedModel, conversions: Sequence[Any] | None = None
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Return the function from what is on disk to a state dict of the model.

    Names are those in memory, and what is several tensors on disk (each expert, gate and up) is
    one where the model has one.

    Args:
        model: of transformers, plain or patched.
        conversions: those that the model was loaded with; by default those of its architecture.
    """
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, names = model.base_model_prefix, model.state_dict()

    def convert(on_disk: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = {}
        collecting: dict[str, Any] = {}
        for key in sorted(on_disk, key=_in_natural_order):  # the tenth expert after the ninth
            name, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if pattern is None:
                converted[name] = on_disk[key]
                continue
            converter = collecting.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, key, pattern, on_disk[key])
        for name, converter in collecting.items():
            made = converter.convert(name, model=model, config=model.config)
            converted |= {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
        return converted

    return convert


def _in_natural_order(key: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", key)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]

"""How names of tensors on disk become names in a model, as `from_pretrained` has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

__all__ = ["key_renaming"]


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

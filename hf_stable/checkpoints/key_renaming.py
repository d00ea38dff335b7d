"""How tensors on disk become those of a model, as `from_pretrained` has it: names, and joining."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

__all__ = ["KeyConversion", "key_renaming"]


def key_renaming(
    model: PreTrainedModel, conversions: Sequence[Any] | None = None
) -> Callable[[str], str]:
    """Return the function from a key on disk to its name in the model.

    Args:
        model: of transformers; it may lie on the meta device.
        conversions: those that the model was loaded with; by default those of its architecture.
    """
    renamings = [each for each in _conversions(model, conversions) if _renames(each)]
    prefix, names = model.base_model_prefix, model.state_dict()
    return lambda key: rename_source_key(key, renamings, [], prefix, names)[0]


class KeyConversion:
    """Turns the state dicts of a checkpoint's files into those that a model takes.

    Where a model joins or splits what files have (experts that are one parameter in memory, gate
    and up that are one in the file), tensors are kept until all that belong together have come:
    they may be in several files.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        conversions: Sequence[Any] | None = None,
        *,
        keys: Iterable[str] | None = None,
    ) -> None:
        """Prepare to convert; the model stays as it is.

        Args:
            model: of transformers.
            conversions: as in `key_renaming`.
            keys: of all files of the checkpoint. Without them each state dict has to be whole.
        """
        entries = _conversions(model, conversions)
        self._model = model
        self._names = model.state_dict()
        self._renamings = [each for each in entries if _renames(each)]
        self._converters = [each for each in entries if isinstance(each, WeightConverter)]
        places = map(self._place_of, keys or ())
        self._awaited = Counter(name for name, pattern in places if pattern is not None)
        self._waiting: defaultdict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)

    def __call__(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return what is complete of a state dict and those before it, under names in memory.

        Keys that the model has nothing for stay as they are.
        """
        converted: dict[str, Any] = {}
        touched: dict[str, None] = {}
        for key, tensor in state_dict.items():
            name, pattern = self._place_of(key)
            if pattern is None:
                converted[name if name in self._names else key] = tensor
            else:
                self._waiting[name][key] = (pattern, tensor)
                touched[name] = None
        for name in touched:
            if len(self._waiting[name]) >= self._awaited.get(name, 0):
                converted |= self._joined(name, self._waiting.pop(name))
        return converted

    def _place_of(self, key: str) -> tuple[str, str | None]:
        """Return the name that a key leads to, and the pattern by which a converter takes it."""
        prefix, names = self._model.base_model_prefix, self._names
        place = rename_source_key(key, self._renamings, self._converters, prefix, names)
        if place[0] not in names and key in names:
            return key, None
        return place

    def _joined(self, name: str, tensors: dict[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return what a converter makes of all tensors that lead to a name, by their patterns."""
        source = next(pattern for pattern, _ in tensors.values())
        found = next(each for each in self._converters if source in each.source_patterns)
        converter = copy.deepcopy(found)
        # In the order of their numbers, whatever that of the files: it is that of the experts.
        for key in sorted(tensors, key=dot_natural_key):
            pattern, tensor = tensors[key]
            converter.add_tensor(name, key, pattern, tensor)
        made = converter.convert(name, model=self._model, config=self._model.config)
        return {
            target: value[0] if isinstance(value, list) else value for target, value in made.items()
        }


def _conversions(model: PreTrainedModel, given: Sequence[Any] | None) -> Sequence[Any]:
    return get_model_conversion_mapping(model, add_legacy=False) if given is None else given


def _renames(entry: Any) -> bool:
    return isinstance(entry, WeightRenaming)

"""The registered architectures, by model type."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from torch import nn

from hf_stable._wording import shortened
from hf_stable.architectures.checking import problem_with
from hf_stable.architectures.description import Architecture, Block
from hf_stable.modeling_hf_stable import MODEL_TYPE_PREFIX

__all__ = [
    "UnsupportedModelError",
    "architecture_of",
    "is_plain_linear",
    "model_type_of",
    "registered_entries",
    "require_model",
    "register_architecture",
    "supported_architectures",
    "way_to_register",
]

way_to_register = "describe it in a few lines with hf_stable.register_architecture"
"""What an error says to whoever has an architecture that is not registered."""

_registry: dict[str, Architecture] = {}


class UnsupportedModelError(ValueError):
    """The model is of no registered architecture, or not in a state that can be worked on."""


def register_architecture(architecture: Architecture, *, overwrite: bool = False) -> None:
    """Make an architecture known to `patch`, the monitor and everything else.

    Args:
        architecture: its description.
        overwrite: replace an entry of the same model_type instead of refusing.

    Raises:
        TypeError: if it is no `Architecture`, or its blocks are none.
        ValueError: if the model_type is registered and `overwrite` is False, or the versions of
            transformers are no requirement.
    """
    if not isinstance(architecture, Architecture):
        raise TypeError(
            f"register_architecture takes an hf_stable.Architecture, got {architecture!r}: name "
            "the model_type in it, and the block's class with its attention and MLP"
        )
    if not all(isinstance(block, Block) for block in architecture.blocks):
        raise TypeError(
            f"block of the entry for {architecture.model_type!r} is {architecture.block!r}: give "
            "an hf_stable.Block, or a tuple of them"
        )
    if problem := problem_with(architecture):
        raise TypeError(f"{problem}: describe it as hf_stable.Architecture says")
    try:
        SpecifierSet(architecture.transformers)
    except InvalidSpecifier as error:
        raise ValueError(
            f"transformers={architecture.transformers!r} of the entry for "
            f'{architecture.model_type!r} says no versions: write them like ">=5.12,<6"'
        ) from error
    if architecture.model_type in _registry and not overwrite:
        raise ValueError(
            f"model_type {architecture.model_type!r} is registered already; pass overwrite=True "
            "to replace its entry"
        )
    _registry[architecture.model_type] = architecture


def registered_entries() -> tuple[Architecture, ...]:
    """Return all entries, whether the installed transformers fits them or not."""
    return tuple(_registry.values())


def supported_architectures() -> list[str]:
    """Return the registered model types that the installed transformers fits, sorted."""
    return sorted(name for name, entry in _registry.items() if _fits(entry))


def is_plain_linear(layer_class: type) -> bool:
    """Say whether an entry declares that a class derived from `nn.Linear` is a plain product."""
    declared = {name for entry in _registry.values() for name in entry.plain_layers}
    return issubclass(layer_class, nn.Linear) and layer_class.__name__ in declared


def require_model(given: Any, function: str) -> None:
    """Raise TypeError, saying what to give, unless a function was given a model."""
    if not isinstance(given, nn.Module):
        raise TypeError(
            f"{function} takes a model itself, as from_pretrained returns it, got "
            f"{shortened(given)}"
        )


def model_type_of(module: Any) -> str | None:
    """Return the model type in a module's config, or None where it has no such thing.

    A model that was loaded without its LayerNorms is of the architecture that it was made from.
    """
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return model_type.removeprefix(MODEL_TYPE_PREFIX) if isinstance(model_type, str) else None


def architecture_of(module: Any) -> Architecture | None:
    """Return the entry for a module's model type, or None where none is registered.

    Raises:
        UnsupportedModelError: if it is registered for other versions of transformers.
    """
    entry = _registry.get(model_type_of(module) or "")
    if entry is not None and not _fits(entry):
        raise UnsupportedModelError(
            f"the entry for {entry.model_type!r} fits transformers {entry.transformers}, and "
            f"{transformers.__version__} is installed; register one that fits with "
            "hf_stable.register_architecture(..., overwrite=True)"
        )
    return entry


def _fits(entry: Architecture) -> bool:
    return SpecifierSet(entry.transformers).contains(transformers.__version__, prereleases=True)

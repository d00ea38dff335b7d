"""The models of registered architectures that a model is or holds.

A model may hold models of several architectures (an encoder and a decoder, a tower and a text
model, anything in a module of the user's): each is found by its config.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from hf_stable.architectures.description import Architecture, Member
from hf_stable.architectures.fitting import refuse_missing
from hf_stable.architectures.paths import class_names, join, named_modules, owner_of
from hf_stable.architectures.registry import (
    UnsupportedModelError,
    architecture_of,
    model_type_of,
    supported_architectures,
    way_to_register,
)

__all__ = ["Region", "find_regions"]


@dataclass(frozen=True)
class Region:
    """A model of a registered architecture: all there is, or a part of another model.

    Attributes:
        name: its name in the whole; "" for the whole itself.
        module: the model.
        architecture: its entry.
        modules: its modules by their names in the whole, without those of regions inside it.
    """

    name: str
    module: nn.Module
    architecture: Architecture
    modules: dict[str, nn.Module] = field(repr=False)

    @cached_property
    def by_class(self) -> dict[str, dict[str, nn.Module]]:
        """Its modules by the names of their classes and of the ancestors of these."""
        found: defaultdict[str, dict[str, nn.Module]] = defaultdict(dict)
        for name, module in self.modules.items():
            for class_name in class_names(module):
                found[class_name][name] = module
        return dict(found)

    def places_of(self, member: Member) -> Iterator[tuple[str, str]]:
        """Yield (name of a module, path) wherever a member is.

        Raises:
            UnsupportedModelError: if a module lacks it, unless it is optional.
        """
        for name, module in self.by_class.get(member.class_name, {}).items():
            for path in _expanded(module, member.path):
                if join(name, path) in self.modules:
                    yield name, path
                elif not member.optional:
                    refuse_missing(self.architecture, module, name, path)


def find_regions(model: nn.Module) -> list[Region]:
    """Return every model of a registered architecture that a model is or holds, in its order.

    Raises:
        UnsupportedModelError: if there is none, or an entry is for other versions of transformers.
    """
    regions: list[Region] = []
    owners: dict[str, Region | None] = {}
    modules = named_modules(model)
    for name, module in modules.items():
        owner = owners.get(name.rpartition(".")[0]) if name else None
        # Parts of a model may keep its config; only a model is one of its own.
        entry = architecture_of(module) if not name or isinstance(module, PreTrainedModel) else None
        if entry is not None and (owner is None or owner.architecture is not entry):
            owner = Region(name, module, entry, {})
            regions.append(owner)
        owners[name] = owner
        if owner is not None:
            owner.modules[name] = module
    if not regions:
        _refuse_unregistered(model, modules)
    return regions


def _expanded(module: nn.Module, path: str) -> list[str]:
    """Return a path once for each child of the list that a `*` in it stands for."""
    before, star, after = path.partition(".*")
    owner = owner_of(module, before) if star else None
    if owner is None:
        return [path]
    return [f"{before}.{child}{after}" for child, _ in getattr(*owner).named_children()]


def _refuse_unregistered(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    held = {
        model_type_of(module)
        for module in modules.values()
        if module is model or isinstance(module, PreTrainedModel)
    } - {None}
    if not held:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config.model_type to look its architecture up by, and "
            "holds no model that has; pass a transformers model, or a module that holds one"
        )
    named = " nor ".join(map(repr, sorted(str(each) for each in held)))
    raise UnsupportedModelError(
        f"no hf_stable architecture for model_type {named} (supported: "
        f"{', '.join(supported_architectures())}); {way_to_register}"
    )

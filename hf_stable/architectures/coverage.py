"""The matrices of a model that no entry names, so that "all patched" cannot mislead."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from hf_stable._ranks import whole_shape
from hf_stable.architectures.finding import FoundLayer, find_layers
from hf_stable.architectures.paths import join, named_modules
from hf_stable.architectures.regions import Region, find_regions

__all__ = ["Uncovered", "find_uncovered"]

_NO_MATRICES = ("bias", "embed", "position", "pos_", "table", "token")
"""Parts of the names of bare parameters that hold rows of a table, not a linear map."""


@dataclass(frozen=True)
class Uncovered:
    """A matrix that no method touches: its name, its shape, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


def find_uncovered(model: nn.Module, layers: list[FoundLayer] | None = None) -> list[Uncovered]:
    """Return every matrix of a model that is in no entry, or left out by one, in its order.

    Embeddings are none, nor are tables of positions and biases.

    Args:
        model: of registered architectures.
        layers: what `find_layers` has found in it, for who has it at hand.

    Raises:
        UnsupportedModelError: as `find_layers` does.
    """
    regions = find_regions(model)
    layers = find_layers(model) if layers is None else layers
    covered = {id(layer.weight) for layer in layers}
    covering = {layer.name for layer in layers if layer.parameter == "weight"}
    reasons = _reasons(regions)
    found = []
    for name, module in named_modules(model).items():
        if isinstance(module, nn.Embedding) or _is_within(name, covering):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in covered or not _is_matrix(attribute, parameter):
                continue
            whole = join(name, attribute)
            own = name if attribute == "weight" else whole
            reason = next((w for place, w in reasons.items() if _starts_with(whole, place)), None)
            shape = tuple(whole_shape(parameter))
            found.append(Uncovered(own, shape, reason or _outside(name, regions)))
    return found


def _reasons(regions: list[Region]) -> dict[str, str]:
    """Map the name of every place that an entry leaves out to its reason."""
    return {
        join(name, left.path): left.reason
        for region in regions
        for left in region.architecture.left_out
        for name in region.by_class.get(left.class_name, {})
    }


def _outside(name: str, regions: list[Region]) -> str:
    inside = [region for region in regions if name in region.modules]
    if not inside:
        return "outside the models that are registered"
    return f"the entry for {inside[0].architecture.model_type!r} does not name it"


def _is_within(name: str, covering: set[str]) -> bool:
    """Say whether a module is a part of a layer that is covered: an adapter's, for example."""
    while name:
        name = name.rpartition(".")[0]
        if name in covering:
            return True
    return False


def _starts_with(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def _is_matrix(attribute: str, parameter: Tensor) -> bool:
    if not parameter.is_floating_point() or len(whole_shape(parameter)) < 2:
        return False
    if attribute == "weight":
        return True
    long_sides = sum(size > 1 for size in whole_shape(parameter))
    return long_sides >= 2 and not any(part in attribute for part in _NO_MATRICES)

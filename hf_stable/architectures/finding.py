"""Where the matrices and norms of a model are, by the entries of its architectures.

They are in blocks, which `found_blocks` finds, and in other modules that an entry names. All that
is found can be had from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from hf_stable.architectures.description import Attention, Block, Member
from hf_stable.architectures.found_blocks import FoundBlock, blocks_of, find_blocks
from hf_stable.architectures.heads import Role, parts_of_projection, roles_at
from hf_stable.architectures.paths import has_path, is_stack, join, named_modules, owner_of
from hf_stable.architectures.regions import Region, find_regions
from hf_stable.measures.parts import WHOLE, Parts

__all__ = [
    "FoundBlock",
    "FoundLayer",
    "FoundNorm",
    "Placement",
    "Region",
    "find_blocks",
    "find_layers",
    "find_norms",
    "find_regions",
    "norm_paths",
]

Placement = Literal["pre", "post", "branch", "other"]


@dataclass(frozen=True)
class FoundLayer:
    """A weight matrix of a model, or several in one weight.

    Attributes:
        name: of the layer in the model; of a bare parameter, that of the parameter.
        module: the module that holds the weight.
        roles: what its parts are for; of a stack of experts, what those of each expert are for.
        parts: where they lie in the weight.
        parameter: attribute of the module that is the weight.
        bypassed: whether the model uses the weight without the layer's forward.
    """

    name: str
    module: nn.Module
    roles: tuple[Role, ...]
    parts: Parts = WHOLE
    parameter: str = "weight"
    bypassed: bool = False

    @property
    def num_parts(self) -> int:
        """How many projections the weight holds side by side."""
        return len(self.roles)

    @property
    def weight(self) -> Tensor | None:
        """The weight; None for a layer that has none, such as what replaced a head."""
        weight = getattr(self.module, self.parameter, None)
        return weight if isinstance(weight, Tensor) else None


@dataclass(frozen=True)
class FoundNorm:
    """A normalisation layer of a model, where it stands, and what it adds to its weight."""

    name: str
    module: nn.Module
    placement: Placement
    gain_offset: float = 0.0


def find_layers(model: nn.Module) -> list[FoundLayer]:
    """Return every weight matrix that the architectures of a model name, in the model's order.

    Raises:
        UnsupportedModelError: as `find_blocks` does, or if a module lacks a layer that its
            architecture names.
    """
    found: dict[str, FoundLayer] = {}
    for region in find_regions(model):
        for block in blocks_of(region):
            for path, roles, attention in _matrices_of(block):
                name = join(block.name, path)
                found[name] = _found_layer(block, name, path, roles, attention)
        for name, role in _members_of(region):
            layer = region.modules[name]
            if not isinstance(layer, nn.Identity):  # a head with num_labels=0
                found[name] = FoundLayer(name, layer, (role,))
    order = {id(module): index for index, module in enumerate(model.modules())}
    return sorted(found.values(), key=lambda layer: order[id(layer.module)])


def find_norms(model: nn.Module) -> list[FoundNorm]:
    """Return every norm that the architectures of a model name, in the model's order.

    Raises:
        UnsupportedModelError: as `find_layers` does, for norms.
    """
    found: dict[str, FoundNorm] = {}
    for region in find_regions(model):
        offsets = {block.gain_offset for block in region.architecture.blocks} or {0.0}
        for each in blocks_of(region):
            for placement, paths in norm_paths(each.block).items():
                for path in paths:
                    name = join(each.name, path)
                    if has_path(each.module, path):
                        norm = region.modules[name]
                        found[name] = FoundNorm(name, norm, placement, each.block.gain_offset)
        for member in region.architecture.norms:
            for name, path in region.places_of(member):
                norm = region.modules[join(name, path)]
                found[join(name, path)] = FoundNorm(join(name, path), norm, "other", max(offsets))
    order = {name: index for index, name in enumerate(named_modules(model))}
    return sorted(found.values(), key=lambda norm: order[norm.name])


def norm_paths(block: Block) -> dict[Placement, tuple[str, ...]]:
    """Return the paths of a block's norms by where they stand."""
    return {"pre": block.pre_norms, "post": block.post_norms, "branch": block.branch_norms}


def _matrices_of(found: FoundBlock) -> Iterator[tuple[str, tuple[Role, ...], Attention | None]]:
    """Yield (path, roles of its parts, the attention it belongs to) of a block's matrices."""
    block = found.block
    for _, attention in found.attentions():
        paths = (attention.query, attention.key, attention.value, attention.output)
        for path in dict.fromkeys(paths):
            yield path, roles_at(attention, path), attention
    entering: tuple[Role, ...] = ("mlp_in",)
    for path in dict.fromkeys(block.mlp_in):
        yield path, entering * block.mlp_in.count(path), None
    for path in block.mlp_out:
        yield path, ("mlp_out",), None


def _found_layer(
    found: FoundBlock,
    name: str,
    path: str,
    roles: tuple[Role, ...],
    attention: Attention | None,
) -> FoundLayer:
    owner = owner_of(found.module, path)
    assert owner is not None  # `choose_block` has seen it
    module, attribute = owner
    target: Any = getattr(module, attribute)
    dim = 1 if found.block.transposed_experts else 0
    stack = Parts((1,) * len(roles), 1, dim, stacked=True)
    if isinstance(target, nn.Parameter):
        return FoundLayer(name, module, roles, stack, attribute)
    if is_stack(target):  # patched: a layer in the place of the parameter
        return FoundLayer(name, target, roles, stack)
    parts = parts_of_projection(found.module, target, roles, attention)
    bypassed = attention is not None and attention.bypassed
    return FoundLayer(name, target, roles, parts, bypassed=bypassed)


def _members_of(region: Region) -> Iterator[tuple[str, Role]]:
    """Yield (name, role) of every layer outside the blocks."""
    roles: tuple[tuple[tuple[Member, ...], Role], ...] = (
        (region.architecture.layers, "other"),
        (region.architecture.heads, "head"),
    )
    for members, role in roles:
        for member in members:
            for name, path in region.places_of(member):
                yield join(name, path), role

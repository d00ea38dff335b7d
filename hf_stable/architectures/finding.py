"""Where the blocks, matrices and norms of a model are, by the entries of its architectures.

A model may hold models of several architectures (an encoder and a decoder, a tower and a text
model, anything in a module of the user's): each is found by its config, and its modules by the
entry that is registered for it. Over three hundred lines, since blocks, layers and norms are found
by one walk over one list of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_stable.architectures.description import Architecture, Attention, Block, Member
from hf_stable.architectures.fitting import (
    choose_block,
    refuse_missing,
    refuse_unknown_classes,
    refuse_unnamed_blocks,
)
from hf_stable.architectures.heads import Role, parts_of_projection, roles_at
from hf_stable.architectures.paths import (
    class_names,
    has_path,
    is_stack,
    join,
    modules_of_class,
    named_modules,
    owner_of,
)
from hf_stable.architectures.registry import (
    UnsupportedModelError,
    architecture_of,
    model_type_of,
    supported_architectures,
    way_to_register,
)
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
]

Placement = Literal["pre", "post", "branch", "other"]


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


@dataclass(frozen=True)
class FoundBlock:
    """A block of a model, and what its entry says of it.

    Attributes:
        name: of the block in the whole model.
        module: the block.
        block: its description.
        in_rotary_model: whether its model has a module for rotary embeddings.
    """

    name: str
    module: nn.Module
    block: Block
    in_rotary_model: bool = False

    def attentions(self) -> list[tuple[str, Attention]]:
        """Return the attentions that are there, with the names that they go by in records.

        The first one goes by the name of the block, every other one by that of its own module.
        """
        return [
            (join(self.name, attention.module) if index else self.name, attention)
            for index, attention in enumerate(self.block.attentions)
            if has_path(self.module, attention.module)
        ]

    def has_plain_logits(self, attention: Attention) -> bool:
        """Say whether logits are `scale * (Wq x + bq) . (Wk y + bk)` and a mask, nothing else.

        Theorem 3.1 of Zhai et al. 2023 bounds the entropy by the spectra of weights and tokens for
        these, not for queries and keys that are rotated or normalised in between.
        """
        return not self.logit_changes(attention)

    def logit_changes(self, attention: Attention) -> list[str]:
        """Return what an attention does to its logits beside that, in words."""
        rotary, normed = attention.rotary, attention.normed
        if rotary is None:
            rotary = self.in_rotary_model
        if normed is None:
            children = self.module.get_submodule(attention.module).named_children()
            normed = any("norm" in name for name, _ in children)
        changes = {
            "rotary positions": rotary,
            "normalised queries and keys": normed,
            "logits of its own": attention.biased,
        }
        return [change for change, is_made in changes.items() if is_made]


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


def find_blocks(model: nn.Module) -> list[FoundBlock]:
    """Return every block of the registered architectures in a model, in its order.

    It may have none: a model of no layers, or of such a head class.

    Raises:
        UnsupportedModelError: if an entry does not fit its model: it names a class or a path that
            is not there, or leaves out blocks that are.
    """
    return [found for region in find_regions(model) for found in _blocks_of(region)]


def find_layers(model: nn.Module) -> list[FoundLayer]:
    """Return every weight matrix that the architectures of a model name, in the model's order.

    Raises:
        UnsupportedModelError: as `find_blocks` does, or if a module lacks a layer that its
            architecture names.
    """
    found: dict[str, FoundLayer] = {}
    for region in find_regions(model):
        for block in _blocks_of(region):
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
        for each in _blocks_of(region):
            for placement, paths in norm_paths(each.block).items():
                for path in paths:
                    name = join(each.name, path)
                    if has_path(each.module, path):
                        norm = region.modules[name]
                        found[name] = FoundNorm(name, norm, placement, each.block.gain_offset)
        for member in region.architecture.norms:
            for name, path in _places_of(region, member):
                norm = region.modules[join(name, path)]
                found[join(name, path)] = FoundNorm(join(name, path), norm, "other", max(offsets))
    order = {name: index for index, name in enumerate(named_modules(model))}
    return sorted(found.values(), key=lambda norm: order[norm.name])


def norm_paths(block: Block) -> dict[Placement, tuple[str, ...]]:
    """Return the paths of a block's norms by where they stand."""
    return {"pre": block.pre_norms, "post": block.post_norms, "branch": block.branch_norms}


def _blocks_of(region: Region) -> list[FoundBlock]:
    blocks = region.architecture.blocks
    known = {block.class_name for block in blocks}
    rotary = any(_is_rotary(module) for module in region.modules.values())
    found = []
    for name, module in region.modules.items():
        own_class = next((each for each in class_names(module) if each in known), None)
        if own_class is not None:
            variants = [block for block in blocks if block.class_name == own_class]
            block = choose_block(region.architecture, variants, name, module)
            found.append(FoundBlock(name, module, block, rotary))
    refuse_unknown_classes(region.architecture, region.module, region.modules)
    described = [(each.name, each.module, each.block) for each in found]
    refuse_unnamed_blocks(region.architecture, region.modules, described)
    return found


def _is_rotary(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Rotary" in name or "Rope" in name


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
            for name, path in _places_of(region, member):
                yield join(name, path), role


def _places_of(region: Region, member: Member) -> Iterator[tuple[str, str]]:
    """Yield (name of a module, path) wherever a member is.

    Raises:
        UnsupportedModelError: if a module lacks it, unless it is optional.
    """
    for name, module in modules_of_class(region.modules, member.class_name):
        for path in _expanded(module, member.path):
            if join(name, path) in region.modules:
                yield name, path
            elif not member.optional:
                refuse_missing(region.architecture, module, name, path)


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

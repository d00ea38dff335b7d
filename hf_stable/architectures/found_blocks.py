"""The blocks of a model: where they are, and what their entry says of each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_stable.architectures.description import Attention, Block
from hf_stable.architectures.fitting import (
    choose_block,
    refuse_unknown_classes,
    refuse_unnamed_blocks,
)
from hf_stable.architectures.paths import class_names, has_path, join
from hf_stable.architectures.regions import Region, find_regions

__all__ = ["FoundBlock", "blocks_of", "find_blocks"]


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


def find_blocks(model: nn.Module) -> list[FoundBlock]:
    """Return every block of the registered architectures in a model, in its order.

    It may have none: a model of no layers, or of such a head class.

    Raises:
        UnsupportedModelError: if an entry does not fit its model: it names a class or a path that
            is not there, or leaves out blocks that are.
    """
    return [found for region in find_regions(model) for found in blocks_of(region)]


def blocks_of(region: Region) -> list[FoundBlock]:
    """Return the blocks of one region, in its order; raises as `find_blocks` does."""
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

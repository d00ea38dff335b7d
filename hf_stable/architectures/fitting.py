"""Whether an entry fits the model that it is used on, and an error that says where it does not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from torch import nn

from hf_stable._wording import nearest
from hf_stable.architectures.description import Architecture, Block
from hf_stable.architectures.paths import class_names, has_path, join
from hf_stable.architectures.registry import UnsupportedModelError

__all__ = ["choose_block", "refuse_missing", "refuse_unknown_classes", "refuse_unnamed_blocks"]

_WAY_OUT = "register an entry that fits with hf_stable.register_architecture(..., overwrite=True)"


def choose_block(
    architecture: Architecture, variants: Sequence[Block], name: str, module: nn.Module
) -> Block:
    """Return the first of several descriptions whose paths a block has.

    Raises:
        UnsupportedModelError: if none fits, naming what the nearest one misses.
    """
    missing = [_missing_paths(block, module) for block in variants]
    for block, paths in zip(variants, missing, strict=True):
        if not paths and _meets(block, module):
            return block
    if [] in missing:
        conditions = " nor ".join(str(block.condition) for block in variants)
        raise UnsupportedModelError(
            f"the entry for {architecture.model_type!r} describes a {type(module).__name__} by "
            f"{conditions}, none of which holds for {name!r}; {_WAY_OUT}"
        )
    refuse_missing(architecture, module, name, min(missing, key=len)[0])


def refuse_missing(architecture: Architecture, module: nn.Module, name: str, path: str) -> NoReturn:
    """Raise UnsupportedModelError for a path that a module does not have."""
    known = [inner for inner, _ in module.named_modules() if inner]
    known = [inner for inner in known if inner.count(".") == path.count(".")] or known
    raise UnsupportedModelError(
        f"the entry for {architecture.model_type!r} names {join(name, path)!r}, which this "
        f"{type(module).__name__} does not have{nearest(path, known)}; {_WAY_OUT}"
    )


def refuse_unknown_classes(
    architecture: Architecture, model: nn.Module, modules: Mapping[str, nn.Module]
) -> None:
    """Raise UnsupportedModelError for a block class that neither model nor transformers knows.

    A class that is defined beside the model, and not used in it, is no mistake: a decoder alone
    has no encoder blocks, and a model may be of no layers.
    """
    own_classes = {type(module) for module in modules.values()}
    classes = {cls for own in own_classes for cls in own.__mro__}
    present, files = {cls.__name__ for cls in classes}, {cls.__module__ for cls in classes}
    for block in architecture.blocks:
        name = block.class_name
        if name in present or any(hasattr(sys.modules.get(file), name) for file in files):
            continue
        raise UnsupportedModelError(
            f"the entry for {architecture.model_type!r} names the block class {name!r}, which this "
            f"{type(model).__name__} does not have{nearest(name, sorted(present))}; its modules "
            f"are of {', '.join(sorted({own.__name__ for own in own_classes}))}. "
            f"{_WAY_OUT.capitalize()}"
        )


def refuse_unnamed_blocks(
    architecture: Architecture,
    modules: Mapping[str, nn.Module],
    found: Sequence[tuple[str, nn.Module, Block]],
) -> None:
    """Raise UnsupportedModelError if an entry describes some blocks of a model but not all.

    A block that no description covers is told by an attention of a class that others have, or by
    standing in a list of modules that hold several matrices each, none of them named.

    Args:
        architecture: the entry.
        modules: of its model, by name.
        found: name, module and description of every block that was found.
    """
    if not architecture.blocks:
        return
    inside = {id(part) for _, module, _ in found for part in module.modules()}
    attentions = {
        type(module.get_submodule(attention.module))
        for _, module, block in found
        for attention in block.attentions
        if has_path(module, attention.module)
    }
    for name, module in modules.items():
        if id(module) in inside:
            continue
        if type(module) in attentions:
            _refuse_unnamed(architecture, name, f"the attention of class {type(module).__name__}")
        if isinstance(module, nn.ModuleList):
            for index, block in enumerate(module):
                if _looks_like_a_block(block, inside, architecture):
                    what = f"a block of class {type(block).__name__}"
                    _refuse_unnamed(architecture, join(name, str(index)), what)


def _refuse_unnamed(architecture: Architecture, name: str, what: str) -> NoReturn:
    classes = ", ".join(dict.fromkeys(block.class_name for block in architecture.blocks))
    raise UnsupportedModelError(
        f"the entry for {architecture.model_type!r} names blocks of class {classes}, but {name!r} "
        f"is {what} that it leaves out: only a part of the model would be patched and watched. "
        f"Give Architecture(block=(Block(...), Block(...))) a description of each kind; {_WAY_OUT}"
    )


def _meets(block: Block, module: nn.Module) -> bool:
    if block.condition is None:
        return True
    attribute, value = block.condition
    return getattr(module, attribute, None) == value


def _missing_paths(block: Block, module: nn.Module) -> list[str]:
    """Return the paths of a description that a module lacks."""
    present = [each for each in block.attentions if has_path(module, each.module)]
    absent = [each for each in block.attentions if each not in present]
    missing = [each.module for each in absent if not each.is_cross]
    for attention in present:
        paths = (attention.query, attention.key, attention.value, attention.output)
        missing += [path for path in paths if not has_path(module, path)]
    missing += [path for path in (*block.mlp_in, *block.mlp_out) if not has_path(module, path)]
    norms = (*block.pre_norms, *block.post_norms, *block.branch_norms)
    without = [path for path in norms if not has_path(module, path)]
    # A cross-attention that is not there takes its norm with it.
    return missing + without[sum(each.is_cross for each in absent) :]


def _looks_like_a_block(
    module: nn.Module, inside: Iterable[int], architecture: Architecture
) -> bool:
    """Say whether a module holds an attention's worth of matrices and no block that is known."""
    parts = list(module.modules())
    named = {m.class_name for m in (*architecture.layers, *architecture.heads)}
    named |= {each.class_name for each in architecture.left_out}
    if any(id(part) in inside or named.intersection(class_names(part)) for part in parts):
        return False
    return sum(isinstance(part, nn.Linear) for part in parts) >= 3

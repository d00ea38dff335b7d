"""What hf_stable knows of an architecture, as data: where its matrices and its norms are.

Modules are found by the name of their class, and weights by their attribute in it: a Linear that
a user adds to a model is never mistaken for one of the model's own, and every head class of an
architecture is covered by the same entry.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from hf_stable._wording import nearest
from hf_stable.modeling_hf_stable import MODEL_TYPE_PREFIX

__all__ = [
    "Architecture",
    "Attention",
    "Block",
    "FoundLayer",
    "FoundNorm",
    "Member",
    "UnsupportedModelError",
    "find_blocks",
    "find_layers",
    "find_norms",
    "lookup",
    "register_architecture",
    "state_dict_name",
    "supported_architectures",
]

CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module"
"""What torch puts into the names of modules for activation checkpointing (`checkpoint_wrapper`),
and takes out of state dicts."""

Role = Literal["query", "key", "value", "output", "mlp_in", "mlp_out", "other", "head"]
Placement = Literal["pre", "post", "other"]


class UnsupportedModelError(ValueError):
    """The model is of no registered architecture, or not in a state that can be worked on."""


@dataclass(frozen=True)
class Attention:
    """One attention of a block; paths are relative to the block.

    A fused projection is named once for each of its parts: GPT-2 has
    `query = key = value = "attn.c_attn"`, whose three parts lie in that order.

    Attributes:
        module: the module that calls the attention function. An attention whose module a block
            does not have (optional cross-attention) is left out.
        query: projection of the queries; likewise key, value and output.
        num_heads: attribute of `module` that holds the number of query heads.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    num_heads: str = "num_attention_heads"


@dataclass(frozen=True)
class Block:
    """The repeated block of an architecture; paths are relative to it.

    Attributes:
        class_name: name of the block's class in transformers.
        attentions: its attentions, self-attention first.
        mlp_in: matrices that enter the MLP (two for a gated one); `W1` of the papers.
        mlp_out: matrices that leave it; `W2`.
        pre_norms: norms in front of attention and MLP, in the order of the forward.
        post_norms: norms behind the residual additions (post-LN).
    """

    class_name: str
    attentions: tuple[Attention, ...]
    mlp_in: tuple[str, ...]
    mlp_out: tuple[str, ...]
    pre_norms: tuple[str, ...] = ()
    post_norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Member:
    """An attribute (dotted path) of every module of a class."""

    class_name: str
    path: str


@dataclass(frozen=True)
class Architecture:
    """A transformers architecture.

    Attributes:
        model_type: `config.model_type`.
        block: its repeated block.
        layers: weight matrices outside the blocks: patch embeddings, poolers, downsampling.
        heads: the last projection of each head class.
        norms: norms outside the blocks' residual branches: final norm, embedding norm.
    """

    model_type: str
    block: Block
    layers: tuple[Member, ...] = ()
    heads: tuple[Member, ...] = ()
    norms: tuple[Member, ...] = ()


@dataclass(frozen=True)
class FoundLayer:
    """A weight matrix of a model: its module, what it is for, and its number of fused parts."""

    name: str
    module: nn.Module
    roles: tuple[Role, ...]

    @property
    def num_parts(self) -> int:
        """Return how many projections the weight holds side by side."""
        return len(self.roles)


@dataclass(frozen=True)
class FoundNorm:
    """A normalisation layer of a model and where it stands."""

    name: str
    module: nn.Module
    placement: Placement


_registry: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture, *, overwrite: bool = False) -> None:
    """Make an architecture known to `patch`, the monitor and everything else.

    Args:
        architecture: its description.
        overwrite: replace an entry of the same model_type instead of refusing.

    Raises:
        TypeError: if it is no `Architecture`.
        ValueError: if the model_type is registered and `overwrite` is False.
    """
    if not isinstance(architecture, Architecture):
        raise TypeError(
            f"register_architecture takes an hf_stable.Architecture, got {architecture!r}: name "
            "the model_type in it, and the block's class with its attention and MLP"
        )
    if architecture.model_type in _registry and not overwrite:
        raise ValueError(
            f"model_type {architecture.model_type!r} is registered already; pass overwrite=True "
            "to replace its entry"
        )
    _registry[architecture.model_type] = architecture


def supported_architectures() -> list[str]:
    """Return the registered model types, sorted."""
    return sorted(_registry)


def lookup(model: nn.Module) -> Architecture:
    """Return the architecture of a model by its config.

    A model that was loaded without its LayerNorms is of the architecture that it was made from.

    Raises:
        UnsupportedModelError: if the model has no config or its model_type is not registered.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is not None:
        model_type = model_type.removeprefix(MODEL_TYPE_PREFIX)
    if model_type not in _registry:
        if model_type is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no config.model_type to look its architecture up by; "
                "pass the transformers model itself"
            )
        raise UnsupportedModelError(
            f"no hf_stable architecture for model_type {model_type!r} (supported: "
            f"{', '.join(supported_architectures())}); describe it in a few lines with "
            "hf_stable.register_architecture"
        )
    return _registry[model_type]


def state_dict_name(name: str) -> str:
    """Return what a state dict calls a module or parameter, for its name in the model.

    The two differ where torch has put a wrapper around a block for activation checkpointing.
    """
    return ".".join(part for part in name.split(".") if part != CHECKPOINT_WRAPPER)


def find_blocks(model: nn.Module, architecture: Architecture) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of every block, in the order of the model; it may have none.

    Raises:
        UnsupportedModelError: if the model has no block and knows no class of that name.
    """
    class_name = architecture.block.class_name
    blocks = list(_of_class(model, class_name))
    if not blocks and not _is_defined_beside(model, class_name):
        names = sorted({type(module).__name__ for module in model.modules()})
        raise UnsupportedModelError(
            f"the entry for {architecture.model_type!r} names the block class {class_name!r}, "
            f"which this {type(model).__name__} does not have{nearest(class_name, names)}; its "
            f"modules are of {', '.join(names)}. Register an entry that fits with "
            "hf_stable.register_architecture(..., overwrite=True)"
        )
    return blocks


def find_layers(model: nn.Module, architecture: Architecture) -> list[FoundLayer]:
    """Return every weight matrix that the architecture names, in the order of the model.

    Raises:
        UnsupportedModelError: if a module lacks a layer that its architecture names, or there is
            no such block: the entry does not fit this version of transformers.
    """
    found: dict[str, list[Role]] = {}
    block = architecture.block
    for name, module in find_blocks(model, architecture):
        for path, role in _block_matrices(block, module):
            found.setdefault(_join(name, path), []).append(role)
    outside: tuple[tuple[tuple[Member, ...], Role], ...] = (
        (architecture.layers, "other"),
        (architecture.heads, "head"),
    )
    for members, role in outside:
        for member in members:
            for name, _ in _of_class(model, member.class_name):
                found.setdefault(_join(name, member.path), []).append(role)
    modules = _named_modules(model)
    missing = found.keys() - modules.keys()
    if missing:
        raise UnsupportedModelError(
            f"the entry for {architecture.model_type!r} names {sorted(missing)[0]!r}, which this "
            f"{type(model).__name__} does not have; register an entry that fits with "
            "hf_stable.register_architecture(..., overwrite=True)"
        )
    return [
        FoundLayer(name, module, tuple(found[name]))
        for name, module in modules.items()
        if name in found and not isinstance(module, nn.Identity)  # a head with num_labels=0
    ]


def find_norms(model: nn.Module, architecture: Architecture) -> list[FoundNorm]:
    """Return every norm that the architecture names and the model has, in its order."""
    found: dict[str, Placement] = {}
    block = architecture.block
    for name, _ in find_blocks(model, architecture):
        found |= {_join(name, path): "pre" for path in block.pre_norms}
        found |= {_join(name, path): "post" for path in block.post_norms}
    for member in architecture.norms:
        for name, _ in _of_class(model, member.class_name):
            found[_join(name, member.path)] = "other"
    return [
        FoundNorm(name, module, found[name])
        for name, module in _named_modules(model).items()
        if name in found
    ]


def _block_matrices(block: Block, module: nn.Module) -> Iterator[tuple[str, Role]]:
    for attention in block.attentions:
        if _has(module, attention.module):
            yield attention.query, "query"
            yield attention.key, "key"
            yield attention.value, "value"
            yield attention.output, "output"
    for path in block.mlp_in:
        yield path, "mlp_in"
    for path in block.mlp_out:
        yield path, "mlp_out"


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by the names of the state dict, of which a wrapper's is its block's."""
    return {state_dict_name(name): module for name, module in model.named_modules()}


def _of_class(model: nn.Module, class_name: str) -> Iterator[tuple[str, nn.Module]]:
    # By the whole line of ancestors: sharding and compilation swap in subclasses.
    for name, module in _named_modules(model).items():
        if any(cls.__name__ == class_name for cls in type(module).__mro__):
            yield name, module


def _is_defined_beside(model: nn.Module, class_name: str) -> bool:
    """Say whether a file that makes up the model's class has a class, used in it or not."""
    files = (sys.modules.get(cls.__module__) for cls in type(model).__mro__)
    return any(hasattr(file, class_name) for file in files)


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return False
        module = child
    return True


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path

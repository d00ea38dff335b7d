"""How many heads an attention has, and so where the parts of a fused projection lie."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_stable.architectures.description import Attention
from hf_stable.architectures.paths import weight_holder
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.measures.matrices import as_matrix
from hf_stable.measures.parts import Parts

__all__ = [
    "Role",
    "count_heads",
    "count_key_heads",
    "part_of_role",
    "parts_of_projection",
    "roles_at",
]

Role = Literal["query", "key", "value", "output", "mlp_in", "mlp_out", "other", "head"]

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def count_heads(block: nn.Module, attention: Attention) -> int:
    """Return the number of query heads of an attention in a block.

    Asked are the attribute that the entry names, on the attention and on its config, and then the
    usual names of that number.

    Raises:
        UnsupportedModelError: if none of them holds a number.
    """
    module = block.get_submodule(attention.module)
    names = (attention.num_heads, *_HEADS)
    found = _first_number(module, names)
    if found is None:
        tried = ", ".join(dict.fromkeys(names))
        raise UnsupportedModelError(
            f"how many heads {attention.module!r} of a {type(block).__name__} has is not known: "
            f"neither its {type(module).__name__} nor that one's config has a number in any of "
            f"{tried}; name the attribute that holds it in the entry: Attention(num_heads=...)"
        )
    return found


def count_key_heads(block: nn.Module, attention: Attention) -> int:
    """Return the number of key heads, which is that of the query heads where nothing says more."""
    module = block.get_submodule(attention.module)
    if getattr(module, "multi_query", False) and not getattr(module, "new_decoder_architecture", 0):
        return 1  # Falcon, whose config keeps another number that it does not use then
    return _first_number(module, _KEY_HEADS) or count_heads(block, attention)


def roles_at(attention: Attention, path: str) -> tuple[Role, ...]:
    """Return what the parts of the projection at a path are for, in their order in its weight."""
    paths: dict[Role, str] = {
        "query": attention.query,
        "key": attention.key,
        "value": attention.value,
        "output": attention.output,
    }
    return tuple(role for role, own in paths.items() if own == path)


def part_of_role(block: nn.Module, attention: Attention, role: Role, weight: Tensor) -> Tensor:
    """Return the matrix of one role in the weight of its projection, as (out, in).

    Args:
        block: the block that the attention is in.
        attention: its description.
        role: "query", "key", "value" or "output".
        weight: of the whole projection, as its layer keeps it.
    """
    path = getattr(attention, role)
    layer, roles = block.get_submodule(path), roles_at(attention, path)
    parts = parts_of_projection(block, layer, roles, attention)
    matrix = parts.matrices(as_matrix(weight))[roles.index(role)]
    return matrix.T if isinstance(weight_holder(layer), Conv1D) else matrix


def parts_of_projection(
    block: nn.Module, layer: Any, roles: Sequence[Role], attention: Attention | None
) -> Parts:
    """Return where the parts of a layer's weight lie that hold its roles.

    Args:
        block: the block that the layer is in.
        layer: a plain or a sigma layer.
        roles: what the parts are for, in their order in the weight.
        attention: the attention that the layer belongs to, or None.
    """
    dim = 1 if isinstance(weight_holder(layer), Conv1D) else 0
    shares, repeats = [1] * len(roles), 1
    if attention is not None and "query" in roles and len(roles) > 1:
        heads, key_heads = count_heads(block, attention), count_key_heads(block, attention)
        if attention.per_head:
            repeats, heads, key_heads = key_heads, heads // key_heads, 1
        shares = [heads if role == "query" else key_heads for role in roles]
    return Parts(tuple(shares), repeats, dim)


def _first_number(module: Any, names: Sequence[str]) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            try:
                value = attrgetter(name)(holder)
            except AttributeError:
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None

"""The effective weights of a block as (out, in) matrices, each formed when it is first asked for.

Where a block keeps its weights is the registry's knowledge; of a patched layer it is `gamma / sigma
* W` that counts, so patched and plain blocks compare.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_stable._ranks import whole_tensor
from hf_stable.architectures.description import Attention, Block
from hf_stable.architectures.finding import FoundBlock
from hf_stable.architectures.heads import (
    Role,
    count_heads,
    part_of_role,
    parts_of_projection,
    roles_at,
)
from hf_stable.architectures.paths import is_stack, owner_of
from hf_stable.measures.matrices import as_matrix
from hf_stable.measures.parts import Parts
from hf_stable.methods.sigma_reparam.function import scale_parts
from hf_stable.methods.sigma_reparam.layers import SigmaLayer

__all__ = ["AttentionWeights", "BlockWeights", "NormGains"]


class AttentionWeights:
    """Wq, Wk, Wv and Wo of one attention of a block."""

    def __init__(self, block: nn.Module, attention: Attention) -> None:
        """Count the heads; read nothing yet."""
        self._block = block
        self._attention = attention
        self.num_heads = count_heads(block, attention)

    @cached_property
    def query(self) -> Tensor:
        """(heads * d_q, d)."""
        return self._matrix("query")

    @cached_property
    def key(self) -> Tensor:
        """(key heads * d_q, d)."""
        return self._matrix("key")

    @cached_property
    def value(self) -> Tensor:
        """(key heads * d_v, d)."""
        return self._matrix("value")

    @cached_property
    def output(self) -> Tensor:
        """(d, heads * d_v)."""
        return self._matrix("output")

    @property
    def query_bias(self) -> Tensor | None:
        """(heads * d_q,), or None."""
        path = self._attention.query
        layer: Any = self._block.get_submodule(path)
        if getattr(layer, "bias", None) is None:
            return None
        roles = roles_at(self._attention, path)
        parts = parts_of_projection(self._block, layer, roles, self._attention)
        return parts.vectors(whole_tensor(layer.bias).detach())[roles.index("query")]

    @property
    def query_scale(self) -> float:
        """By what the queries are multiplied before the attention function gets them."""
        name = self._attention.query_scale
        module: Any = self._block.get_submodule(self._attention.module)
        return 1.0 if name is None else float(getattr(module, name))

    def _matrix(self, role: Role) -> Tensor:
        layer = self._block.get_submodule(getattr(self._attention, role))
        return part_of_role(self._block, self._attention, role, _effective(layer, "weight"))


class BlockWeights:
    """The matrices of a block's MLP, each expert's among them."""

    def __init__(self, found: FoundBlock) -> None:
        """Remember the block; read nothing yet."""
        self._found = found

    @cached_property
    def mlp_in(self) -> list[Tensor]:
        """Matrices that enter the MLP; gate and up are two."""
        paths = self._found.block.mlp_in
        return [m for path in dict.fromkeys(paths) for m in self._matrices(path, paths.count(path))]

    @cached_property
    def mlp_out(self) -> list[Tensor]:
        """Matrices that leave it."""
        return [m for path in self._found.block.mlp_out for m in self._matrices(path, 1)]

    @property
    def mlp_products(self) -> list[list[Tensor]]:
        """The factors of every W2 W1: both of the same expert, where there are several."""
        if not self.mlp_out:
            return []
        per_output = len(self.mlp_in) // len(self.mlp_out)
        return [[self.mlp_out[i // per_output], a] for i, a in enumerate(self.mlp_in)]

    def _matrices(self, path: str, num_parts: int) -> list[Tensor]:
        owner = owner_of(self._found.module, path)
        assert owner is not None  # the entry fits
        module, name = owner
        target = getattr(module, name)
        shares = (1,) * num_parts
        if is_stack(target):
            transposed = self._found.block.transposed_experts
            parts = Parts(shares, dim=1 if transposed else 0, stacked=True)
            bare = isinstance(target, nn.Parameter)
            matrices = parts.matrices(_effective(*((module, name) if bare else (target, "weight"))))
        else:
            transposed = isinstance(target, Conv1D)
            parts = Parts(shares, dim=1 if transposed else 0)
            matrices = parts.matrices(as_matrix(_effective(target, "weight")))
        return [matrix.T for matrix in matrices] if transposed else matrices


class NormGains:
    """Gains and biases of the norms at attention (1) and MLP (2) of a block."""

    def __init__(self, module: nn.Module, block: Block) -> None:
        """Remember the first and the last norm of those that stand in front, if there are any."""
        paths = block.pre_norms or block.post_norms or block.branch_norms
        ends = paths[:: len(paths) - 1] if len(paths) > 1 else paths
        self._norms = [module.get_submodule(path) for path in ends]
        self._offset = block.gain_offset

    def vectors(self) -> dict[str, Tensor]:
        """Return them by the names of their terms: `gamma1`, `beta1`, `gamma2`, `beta2`.

        One that a norm lacks (no bias, or the norm was removed) is missing.
        """
        found = {}
        for number, norm in enumerate(self._norms, start=1):
            for name, attribute, offset in (
                ("gamma", "weight", self._offset),
                ("beta", "bias", 0.0),
            ):
                vector = getattr(norm, attribute, None)
                if vector is not None:
                    found[f"{name}{number}"] = whole_tensor(vector).detach().float() + offset
        return found


def _effective(layer: Any, parameter: str) -> Tensor:
    # Whole only where FSDP2 shards below the block; every rank comes by here, so all may gather.
    weight = whole_tensor(getattr(layer, parameter)).detach()
    if isinstance(layer, SigmaLayer):
        scale = whole_tensor(layer.gamma).detach() / layer.sigma
        weight = scale_parts(weight, scale, layer.parts)
    return weight

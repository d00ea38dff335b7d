"""A weight as the rule sees it: gradient, state, options, and the matrices that it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_stable.measures.flat_ranges import FlatRange
from hf_stable.measures.matrices import MatrixShard, matrices_of, shapes_of, spectral_dtype
from hf_stable.measures.parts import Parts
from hf_stable.measures.power_iteration import generic_vector

__all__ = ["LORA_STATE", "MOMENTS", "RULE_STATE", "Weight", "prepare_state"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What torch's AdamW keeps per weight beside `step`; the same here."""

LORA_STATE = ("merged_v", "linear_v", "quadratic_v")
"""What Rule 1 for LoRA keeps with B: right vectors of the merged weight and of the two parts of its
change, (n,) each."""

RULE_STATE = ("weight_v", "update_v", *LORA_STATE, "exempt", "effective_lr")
"""What Rule 1 adds, for each of the k parts of a weight: right vectors of W and U, (k, n) each (a
narrower part's are followed by zeros); whether it is exempt and its last rate, (k,) each."""


@dataclass(slots=True)
class Weight:
    """A parameter with its gradient, its state, the options of its group, and its parts.

    The parameter is a tensor, or the `FlatRange` of one that is cut into flat partitions.
    """

    param: Any
    grad: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]
    parts: Parts

    @property
    def num_parts(self) -> int:
        """How many matrices the parameter stands for."""
        return len(shapes_of(self.param.shape, self.parts))

    @property
    def is_spread(self) -> bool:
        """Whether other processes hold entries of the parameter, or may hold some."""
        return isinstance(self.param, DTensor | FlatRange)

    def matrices(self, tensor: Tensor | FlatRange) -> list[Tensor | MatrixShard]:
        """Return the matrices of a tensor that is laid out like the parameter, to be read."""
        if isinstance(tensor, FlatRange):
            return matrices_of(tensor, self.parts)
        return matrices_of(tensor.reshape(1) if tensor.ndim == 0 else tensor, self.parts)

    def vectors(self, key: str) -> list[Tensor]:
        """View the power vectors that the state has under a key, each as long as its matrix."""
        rows, shapes = self.state[key], shapes_of(self.param.shape, self.parts)
        return [row[:width] for row, (_, width) in zip(rows, shapes, strict=True)]


def prepare_state(weight: Weight) -> None:
    """Create what the state of a weight lacks: all of it, or what Rule 1 adds."""
    param, state = weight.param, weight.state
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
    elif state["step"].device != param.device:
        state["step"] = state["step"].to(param.device)  # ZeroRedundancyOptimizer loads it so
    if math.isinf(weight.group["tau"]) or weight.group["lora_scale"] is not None:
        return
    size = _size_of_vectors(param.shape, weight.parts)
    if "weight_v" in state and state["weight_v"].shape == size:
        return
    for key in RULE_STATE:
        state.pop(key, None)
    dtype = spectral_dtype(param.dtype)
    rows = torch.zeros(size, dtype=dtype, device=param.device)
    for row, (_, width) in zip(rows, shapes_of(param.shape, weight.parts), strict=True):
        row[:width] = generic_vector(width, dtype=dtype, device=param.device)
    for key in ("weight_v", "update_v"):
        state[key] = rows.clone()


@cache
def _size_of_vectors(shape: torch.Size, parts: Parts) -> tuple[int, int]:
    """Return the size of the power vectors of a weight; worked out once for each shape."""
    shapes = shapes_of(shape, parts)
    return len(shapes), max(width for _, width in shapes)

"""A weight that AdamW2 steps: its tensors, its options and the matrices that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_stable.measures.matrices import RowShard, matrices_of, shapes_of
from hf_stable.measures.parts import Parts

__all__ = ["LORA_STATE", "MOMENTS", "RULE_STATE", "Weight"]

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
    """A parameter with its gradient, its state and the options of its group."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]

    @property
    def parts(self) -> Parts:
        """Where the matrices of the parameter lie."""
        return Parts.of(self.group["parts"])

    @property
    def num_parts(self) -> int:
        """How many matrices the parameter stands for."""
        return len(shapes_of(self.param, self.parts))

    def matrices(self, tensor: Tensor) -> list[Tensor | RowShard]:
        """Return the matrices of a tensor that is laid out like the parameter, to be read."""
        return matrices_of(tensor.reshape(1) if tensor.ndim == 0 else tensor, self.parts)

    def vectors(self, key: str) -> list[Tensor]:
        """View the power vectors that the state has under a key, each as long as its matrix."""
        rows, shapes = self.state[key], shapes_of(self.param, self.parts)
        return [row[:width] for row, (_, width) in zip(rows, shapes, strict=True)]

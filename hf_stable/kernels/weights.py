"""What the kernels need to know of a weight that AdamW2 steps; `adamw2.weights` has it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from hf_stable.measures.parts import Parts

__all__ = ["RuledWeight", "TrackedWeight"]


class RuledWeight(Protocol):
    """A parameter with its gradient, its state and the options of its group.

    Attributes:
        param: the parameter.
        grad: its gradient.
        state: `step`, `exp_avg`, `exp_avg_sq`, and for its k parts `weight_v` and `update_v`, (k,
            n) each (a narrower part's vector is followed by zeros), `exempt` and `effective_lr`.
        group: options as `AdamW2` has them.
        parts: where the matrices of the parameter lie.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]
    parts: Parts


class TrackedWeight(Protocol):
    """A layer whose weight has a singular triple for each of its k parts.

    Attributes:
        parts: where they lie.
        power_iterations: how many the triple is moved by.
    """

    parts: Parts
    power_iterations: int

    @property
    def weight(self) -> Tensor:
        """The weight."""

    @property
    def sigma(self) -> Tensor:
        """(k,) values of `u.T W v`."""

    @property
    def sigma_u(self) -> Tensor:
        """(k, m) left vectors; a smaller part's are followed by zeros."""

    @property
    def sigma_v(self) -> Tensor:
        """(k, n) right vectors, likewise."""

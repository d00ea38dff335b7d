"""What the kernels need to know of a weight: that AdamW2 steps, or whose triple is tracked."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_stable.measures.parts import Parts

__all__ = ["RuledWeight", "TrackedWeight", "is_plain"]

PLAIN = frozenset((Tensor, nn.Parameter))


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


def is_plain(tensor: Tensor) -> bool:
    """Say whether the entries of a tensor lie one after the other in memory, and nothing more.

    No subclass, no sparse tensor, and none that counts no versions.
    """
    return (
        type(tensor) in PLAIN
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_inference()
    )

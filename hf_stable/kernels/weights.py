"""What the kernels need to know of a weight: that AdamW2 steps, or whose triple is tracked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hf_stable.kernels.layouts import Layout, lay_out
from hf_stable.measures.parts import Parts

__all__ = [
    "PLAIN",
    "RuledWeight",
    "TrackedWeight",
    "Triples",
    "are_plain",
    "known_layout",
    "triples_of",
]

PLAIN = frozenset((Tensor, nn.Parameter))
"""Types of tensors that are nothing but a place in memory."""


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


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Say whether the entries of each tensor lie one after the other in memory, and nothing more.

    No subclass, no sparse tensor, and none that counts no versions. Together: every tensor of every
    weight is asked for at every step, and calls cost more than what they find.
    """
    strided = torch.strided
    for tensor in tensors:
        if (
            type(tensor) not in PLAIN
            or tensor.layout is not strided
            or not tensor.is_contiguous()
            or tensor.is_inference()
        ):
            return False
    return True


def known_layout(weight: Tensor, parts: Parts) -> Layout:
    """Return where the parts of a weight lie that a kernel takes."""
    layout = lay_out(weight.shape, parts)
    assert layout is not None, "a weight that the kernel refuses"
    return layout


class Triples(NamedTuple):
    """The triples of layers, as `refresh_vectors` takes them: the n-th of each list is a layer's.

    Attributes:
        weights: the weights.
        layouts: where their parts lie.
        sigmas: (k,) each, for k parts.
        us: left vectors, (k, m) each.
        vs: right vectors, (k, n) each.
        iterations: how many all of them are moved by.
    """

    weights: list[Tensor]
    layouts: list[Layout]
    sigmas: list[Tensor]
    us: list[Tensor]
    vs: list[Tensor]
    iterations: int


def triples_of(layers: Sequence[TrackedWeight]) -> Triples:
    """Return the triples of layers that a kernel takes, of equally many power iterations."""
    return Triples(
        [layer.weight for layer in layers],
        [known_layout(layer.weight, layer.parts) for layer in layers],
        [layer.sigma for layer in layers],
        [layer.sigma_u for layer in layers],
        [layer.sigma_v for layer in layers],
        layers[0].power_iterations,
    )

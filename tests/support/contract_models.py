"""The tiny models of the contract, built once each: plain, patched, and trained for three steps."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from architecture_inputs import labelled, loss_of, seed
from tiny_architectures import batch, build, outputs_of
from torch import Tensor

import hf_stable
from hf_stable.measures.matrices import local_matrices
from hf_stable.methods.sigma_reparam.method import sigma_layers

SAME = dict(rtol=1e-4, atol=1e-5)
"""A folded weight is rounded once more than the product that a sigma layer takes.

Each rounding is 6e-8 of its number. A layer's sums have at most 64 terms, so 4e-6 in all, and a
model has some twenty such layers one after another. What cancels to nearly zero still has the
rounding of its terms, which are of the size of one.
"""

OTHER = {key: 10 * value for key, value in SAME.items()}
"""What differs by more than this is no rounding: ten times what `SAME` forgives."""


def fresh(name: str, dropout: float | None = None):
    """A copy of a tiny model, which is built once."""
    return copy.deepcopy(_built(name, dropout))


@functools.lru_cache(maxsize=4)
def _built(name: str, dropout: float | None):
    return build(name, dropout=dropout)


def patch(model, method: Any = "sigma_reparam", **options: Any):
    """Patch without the warning about what is left out, which the contract says itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* matrices are patched", category=UserWarning)
        return hf_stable.patch(model, method, **options)


@torch.no_grad()
def output(model, name: str) -> Tensor:
    """The main output on the batch."""
    return outputs_of(model, batch(name))


@dataclass
class Trained:
    """A patched model after three steps of Adam, in evaluation mode.

    Attributes:
        model: it.
        gammas: gamma of every layer at the start.
        sigmas: the same of sigma, exact.
        ways: spectral norms of the steps of every part, summed.
    """

    model: Any
    gammas: dict[str, Tensor]
    sigmas: dict[str, Tensor]
    ways: dict[str, Tensor]


def parts_of(layer: Any, weight: Tensor) -> list[Tensor]:
    """The matrices in the weight of a sigma layer, in float32."""
    return [matrix.float() for matrix in local_matrices(weight.detach(), layer.parts)]


def train(name: str, model) -> Trained:
    """Patch a model and train it for three steps."""
    model = patch(model.train())
    layers = dict(sigma_layers(model))
    weights = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    run = Trained(
        model,
        {path: layer.gamma.detach().clone() for path, layer in layers.items()},
        {path: layer.sigma.clone() for path, layer in layers.items()},
        {path: torch.zeros_like(layer.sigma) for path, layer in layers.items()},
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    inputs = labelled(name)
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
        for path, layer in layers.items():
            steps = parts_of(layer, layer.weight.detach().float() - weights[path].float())
            run.ways[path] += torch.stack([torch.linalg.matrix_norm(m, 2) for m in steps])
            weights[path] = layer.weight.detach().clone()
    model.eval()
    return run


@functools.lru_cache(maxsize=2)
def trained(name: str) -> Trained:
    seed()
    return train(name, fresh(name))

"""Single layers, plain and reparametrised, and what the reference computes with them."""

from __future__ import annotations

import copy

import torch
from reference import sigma_reparam_svd as reference
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_stable.measures.parts import Parts
from hf_stable.methods.sigma_reparam.swapping import install, prepare

LAYERS = {  # how to build the plain layer, number of parts, shape of an input
    "Linear": (lambda: nn.Linear(12, 9), 1, (2, 20, 12)),
    "Linear without bias": (lambda: nn.Linear(12, 9, bias=False), 1, (2, 20, 12)),
    "Linear of three parts": (lambda: nn.Linear(12, 9), 3, (2, 20, 12)),
    "Conv1D": (lambda: Conv1D(9, 12), 1, (2, 20, 12)),
    "Conv1D of three parts": (lambda: Conv1D(9, 12), 3, (2, 20, 12)),
    "Conv2d": (lambda: nn.Conv2d(3, 9, kernel_size=4, stride=4), 1, (2, 3, 8, 8)),
}


def sigma_layer(made, **options):
    layer, num_parts, _ = made
    layer = copy.deepcopy(layer)
    return install(layer, prepare(layer, parts=equal_parts(num_parts), **options), [])


def equal_parts(num_parts, dim=0):
    return Parts((1,) * num_parts, dim=dim)


def moved_layer(made):
    """A sigma layer as training leaves it: gamma far from sigma, u and v close to converged."""
    layer = sigma_layer(made, init="one")
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight), alpha=0.05)
        layer.gamma.add_(torch.rand_like(layer.gamma))
        layer.sigma.copy_(
            reference.sigma_of(layer.weight, layer.sigma_u, layer.sigma_v, layer.parts.dim)
        )
    return layer


def plain_output(plain, layer, inputs):
    """The plain layer with the reference's effective weight in place of its own."""
    weight = reference.effective_weight(
        layer.weight, layer.gamma, layer.sigma_u, layer.sigma_v, layer.parts.dim
    )
    return torch.func.functional_call(plain, {"weight": weight}, (inputs,))

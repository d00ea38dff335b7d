"""sigmaReparam, slow and obviously right: sigma by SVD, derivatives by plain autograd.

Written from the paper (Zhai et al. 2023, section 3.3): `W_hat = gamma / sigma(W) * W`, with
`sigma(W) = u.T W v` and u, v held constant. Nothing here is shared with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


def blocks_of(weight: Tensor, num_blocks: int, dim: int) -> list[Tensor]:
    """The 2-D matrices that a weight stands for; a kernel (out, ...) becomes (out, rest)."""
    return list(weight.reshape(weight.shape[0], -1).chunk(num_blocks, dim=dim))


def svd_triple(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value with its left and right vectors, in float64."""
    u, s, vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    return s[0], u[:, 0], vh[0]


def svd_vectors(weight: Tensor, num_blocks: int = 1, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Leading vectors u (k, m) and v (k, n) of the blocks of a weight, in its own dtype."""
    triples = [svd_triple(block) for block in blocks_of(weight, num_blocks, dim)]
    u, v = (torch.stack([triple[i] for triple in triples]) for i in (1, 2))
    return u.to(weight.dtype), v.to(weight.dtype)


def sigma_of(weight: Tensor, u: Tensor, v: Tensor, dim: int = 0) -> Tensor:
    """`u.T W v` of each block (k,), a function of W that autograd can follow."""
    pairs = zip(blocks_of(weight, len(u), dim), u, v, strict=True)
    return torch.stack([left @ (block @ right) for block, left, right in pairs])


def effective_weight(weight: Tensor, gamma: Tensor, u: Tensor, v: Tensor, dim: int = 0) -> Tensor:
    """`gamma / sigma * W`, block by block, out of operations that autograd knows."""
    scale = gamma / sigma_of(weight, u, v, dim)
    blocks = blocks_of(weight, len(u), dim)
    return torch.cat([s * b for s, b in zip(scale, blocks, strict=True)], dim).reshape(weight.shape)


def reference_outputs(plain: nn.Module, patched: nn.Module, parameters: dict, batch: dict):
    """Run a plain model with the effective weights that a patched model's parameters stand for.

    Args:
        plain: the model before the patch, for its code alone.
        patched: the patched model, for its constants u and v.
        parameters: parameters of the patched model by name, tracked by autograd or torch.func.
        batch: keyword arguments of the model.
    """
    effective = dict(parameters)
    for name, module in patched.named_modules():
        if hasattr(module, "sigma_u"):
            gamma = effective.pop(f"{name}.gamma")
            dim = 1 if type(module).__name__.endswith("Conv1D") else 0
            weight = effective[f"{name}.weight"]
            effective[f"{name}.weight"] = effective_weight(
                weight, gamma, module.sigma_u, module.sigma_v, dim
            )
    return functional_call(plain, effective, kwargs=batch)

"""Arithmetic on the blocks of a weight: scales, `u.T W v`, derivatives of the effective weight.

Pure functions. A weight has k equal blocks along one dimension; each has a gamma, a sigma and a
pair of singular vectors of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_stable.measures.matrices import as_matrix, split_blocks

__all__ = [
    "block_products",
    "first_derivatives",
    "is_traced",
    "matrices_of",
    "pull_back",
    "scale_blocks",
    "sigma_of",
    "spread_over_blocks",
    "write_minus_rank_one",
]


def spread_over_blocks(values: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Spread (k,) values over the blocks of a weight: 0-d for one block, else broadcastable."""
    if len(values) == 1:
        return values[0]
    spread = values.repeat_interleave(weight.shape[dim] // len(values))
    return spread.view([-1 if axis == dim else 1 for axis in range(weight.ndim)])


def scale_blocks(weight: Tensor, scale: Tensor, dim: int) -> Tensor:
    """Return each of the k blocks of a weight times its entry of `scale` (k,), in W's dtype."""
    # A bfloat16 weight times a float32 scale rounds once, not twice.
    product = weight.to(scale.dtype) * spread_over_blocks(scale, weight, dim)
    return product.to(weight.dtype)


def matrices_of(weight: Tensor, num_blocks: int, dim: int) -> tuple[Tensor, ...]:
    """Return the blocks as matrices, views of the weight."""
    return split_blocks(as_matrix(weight), num_blocks, dim)


def sigma_of(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """Return `u.T W v` of each block, (k,), in the dtype of u and v."""
    blocks = matrices_of(weight, len(u), dim)
    return torch.stack([u[i].dot(block.to(u.dtype).mv(v[i])) for i, block in enumerate(blocks)])


def block_products(grad: Tensor, weight: Tensor, dim: int, num_blocks: int) -> Tensor:
    """Return `<G, W>` of each block, (k,), without a tensor of W's size."""
    if num_blocks == 1:
        return torch.dot(grad.reshape(-1), weight.reshape(-1)).view(1)
    if dim == 0:
        blocks = zip(grad.chunk(num_blocks), weight.chunk(num_blocks), strict=True)
        return torch.stack([torch.dot(g.reshape(-1), w.reshape(-1)) for g, w in blocks])
    # Blocks of columns: sum down the rows, some cache-sized bands of rows at a time.
    rows = max(1, 2**19 // weight.shape[1])
    bands = zip(grad.split(rows), weight.split(rows), strict=True)
    columns = torch.stack([(g * w).sum(0) for g, w in bands]).sum(0)
    return columns.view(num_blocks, -1).sum(1)


def pull_back(
    grad: Tensor, weight: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of W and gamma for `grad`, the gradient of W_hat."""
    if torch.is_grad_enabled():
        # A second derivative is wanted: sigma must be the function of W that it is. The saved
        # value as a constant would pass gradcheck and give a wrong Hessian.
        sigma = sigma_of(weight, u, v, dim)
    return first_derivatives(grad, weight, gamma, sigma, u, v, dim)


def first_derivatives(
    grad: Tensor, weight: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of W and gamma, in which sigma is the number that it is."""
    grad_gamma = block_products(grad, weight, dim, len(gamma)).to(gamma.dtype) / sigma
    return _minus_rank_one(grad, gamma / sigma, grad_gamma, u, v, dim), grad_gamma


def _minus_rank_one(
    grad: Tensor, scale: Tensor, coefficient: Tensor, u: Tensor, v: Tensor, dim: int
) -> Tensor:
    """Return `scale * (G - coefficient * u v.T)` block by block, shaped like G."""
    num_blocks = len(scale)
    if grad.device.type == "cpu" and not torch.is_grad_enabled() and not is_traced(grad):
        result = torch.empty_like(grad, memory_format=torch.contiguous_format)
        write_minus_rank_one(
            result,
            grad,
            scale.tolist(),
            coefficient.tolist(),
            u.to(grad.dtype),
            v.to(grad.dtype),
            dim,
        )
        return result
    blocks = zip(matrices_of(grad, num_blocks, dim), u, v, scale, coefficient, strict=True)
    results = [
        ((block.to(left.dtype) - torch.outer(c * left, right)) * s).to(grad.dtype)
        for block, left, right, s, c in blocks
    ]
    return (torch.cat(results, dim) if num_blocks > 1 else results[0]).view(grad.shape)


def write_minus_rank_one(
    result: Tensor,
    grad: Tensor,
    scales: list[float],
    coefficients: list[float],
    u: Tensor,
    v: Tensor,
    dim: int,
) -> None:
    """Write `_minus_rank_one` to `result`, which may be `grad`, in one pass; on a CPU only."""
    outs, grads = (matrices_of(t, len(scales), dim) for t in (result, grad))
    for out, block, s, c, left, right in zip(outs, grads, scales, coefficients, u, v, strict=True):
        torch.addr(
            block, left, right, beta=_in_range(s, out), alpha=_in_range(-s * c, out), out=out
        )


def _in_range(value: float, like: Tensor) -> float:
    """Round a number as the dtype of a tensor does: torch refuses a factor beyond its range."""
    largest = torch.finfo(like.dtype).max
    return math.copysign(math.inf, value) if abs(value) > largest else value


def is_traced(tensor: Tensor) -> bool:
    """Say whether values of a tensor cannot be read: a compiler or a transform runs through."""
    functorch = torch._C._functorch
    return (
        torch.compiler.is_compiling()
        or functorch.is_functorch_wrapped_tensor(tensor)
        or functorch.is_legacy_batchedtensor(tensor)  # autograd.grad(..., is_grads_batched=True)
    )

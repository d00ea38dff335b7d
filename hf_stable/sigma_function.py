"""The function behind every sigma layer: `W_hat = gamma / sigma(W) * W`, and its derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_stable.spectral import as_matrix, split_blocks

__all__ = ["effective_weight", "scale_blocks", "spread_over_blocks"]


class _EffectiveWeight(torch.autograd.Function):
    """`W_hat = gamma / sigma(W) * W` with `sigma(W) = u.T W v`, for fixed u and v.

    Zhai et al. 2023, section 3.3. The value of sigma is handed in, as the last refresh left it;
    its derivative in W is `u v.T`, so for G = dL/dW_hat and s = gamma / sigma:
    `dgamma = <G, W> / sigma` and `dW = s (G - <G, W> / sigma * u v.T)`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, dim: int
    ) -> Tensor:
        return scale_blocks(weight, gamma / sigma, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.dim = inputs[5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gamma, sigma, u, v = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A second derivative is wanted: sigma must be the function of W that it is. The saved
            # value as a constant would pass gradcheck and give a wrong Hessian.
            sigma = _sigma_of(weight, u, v, ctx.dim)
        inner = _block_products(grad, weight, ctx.dim, len(gamma)).to(gamma.dtype)
        grad_gamma = inner / sigma if ctx.needs_input_grad[1] else None
        grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_weight = _minus_rank_one(grad, gamma / sigma, inner / sigma, u, v, ctx.dim)
        return grad_weight, grad_gamma, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        weight, gamma, sigma, u, v = ctx.saved_tensors
        dweight, dgamma = tangents[:2]
        tangent = torch.zeros_like(weight)
        if dgamma is not None:
            tangent = tangent + scale_blocks(weight, dgamma / sigma, ctx.dim)
        if dweight is not None:
            dsigma = _sigma_of(dweight, u, v, ctx.dim)
            tangent = tangent + scale_blocks(dweight, gamma / sigma, ctx.dim)
            tangent = tangent - scale_blocks(weight, gamma * dsigma / sigma**2, ctx.dim)
        return tangent


def effective_weight(
    weight: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, dim: int = 0
) -> Tensor:
    """Return `gamma / sigma * W`, differentiable (twice) in weight and gamma.

    Args:
        weight: raw weight, any shape that `as_matrix` accepts; k equal blocks lie along `dim`.
        gamma: (k,) learnable scale of each block.
        sigma: (k,) value of `u.T W v` of each block.
        u: (k, m) left vectors, constants.
        v: (k, n) right vectors, constants.
        dim: dimension along which the blocks lie.

    Returns:
        A tensor like `weight`, in its dtype; the product is taken in gamma's dtype.
    """
    return _EffectiveWeight.apply(weight, gamma, sigma, u, v, dim)


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


def _matrix_blocks(weight: Tensor, num_blocks: int, dim: int) -> tuple[Tensor, ...]:
    return split_blocks(as_matrix(weight), num_blocks, dim)


def _sigma_of(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    blocks = _matrix_blocks(weight, len(u), dim)
    return torch.stack([u[i].dot(block.to(u.dtype).mv(v[i])) for i, block in enumerate(blocks)])


def _block_products(grad: Tensor, weight: Tensor, dim: int, num_blocks: int) -> Tensor:
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


def _minus_rank_one(
    grad: Tensor, scale: Tensor, coefficient: Tensor, u: Tensor, v: Tensor, dim: int
) -> Tensor:
    """Return `scale * (G - coefficient * u v.T)` block by block, shaped like G."""
    num_blocks = len(scale)
    if grad.device.type == "cpu" and not torch.is_grad_enabled() and not _is_traced(grad):
        # Reading a scalar back costs nothing on a CPU, and one pass over G instead of two.
        factors = zip(scale.tolist(), (-scale * coefficient).tolist(), strict=True)
        blocks = zip(_matrix_blocks(grad, num_blocks, dim), u, v, factors, strict=True)
        result = torch.empty_like(grad, memory_format=torch.contiguous_format)
        for out, (block, left, right, (beta, alpha)) in zip(
            _matrix_blocks(result, num_blocks, dim), blocks, strict=True
        ):
            left, right = left.to(block.dtype), right.to(block.dtype)
            torch.addr(block, left, right, beta=beta, alpha=alpha, out=out)
        return result
    blocks_ = zip(_matrix_blocks(grad, num_blocks, dim), u, v, scale, coefficient, strict=True)
    results = [
        ((block.to(left.dtype) - torch.outer(c * left, right)) * s).to(grad.dtype)
        for block, left, right, s, c in blocks_
    ]
    return (torch.cat(results, dim) if num_blocks > 1 else results[0]).view(grad.shape)


def _is_traced(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    return (
        torch.compiler.is_compiling()
        or functorch.is_functorch_wrapped_tensor(tensor)
        or functorch.is_legacy_batchedtensor(tensor)  # autograd.grad(..., is_grads_batched=True)
    )

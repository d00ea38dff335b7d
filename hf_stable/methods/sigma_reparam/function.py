"""The function behind every sigma layer: `W_hat = gamma / sigma(W) * W`, and its derivatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hf_stable.methods.sigma_reparam.block_arithmetic import (
    block_products,
    first_derivatives,
    is_traced,
    pull_back,
    scale_blocks,
    sigma_of,
    spread_over_blocks,
    write_minus_rank_one,
)

__all__ = [
    "effective_weight",
    "scale_blocks",
    "scaled_linear",
    "scales_in_product",
    "spread_over_blocks",
]


_PLAIN_TYPES = (Tensor, nn.Parameter)


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
        grad_weight, grad_gamma = pull_back(grad, weight, gamma, sigma, u, v, ctx.dim)
        return grad_weight, grad_gamma, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        weight, gamma, sigma, u, v = ctx.saved_tensors
        dweight, dgamma = tangents[:2]
        tangent = torch.zeros_like(weight)
        if dgamma is not None:
            tangent = tangent + scale_blocks(weight, dgamma / sigma, ctx.dim)
        if dweight is not None:
            dsigma = sigma_of(dweight, u, v, ctx.dim)
            tangent = tangent + scale_blocks(dweight, gamma / sigma, ctx.dim)
            tangent = tangent - scale_blocks(weight, gamma * dsigma / sigma**2, ctx.dim)
        return tangent


class _CompiledWeight(torch.autograd.Function):
    """`_EffectiveWeight` for `torch.compile`, which would break the graph at its `jvp`."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, dim: int
    ) -> Tensor:
        ctx.save_for_backward(weight, gamma, sigma, u, v)
        ctx.dim = dim
        return scale_blocks(weight, gamma / sigma, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gamma, sigma, u, v = ctx.saved_tensors
        # torch.compile has no second derivatives, for which sigma would be a function of W.
        first = first_derivatives(grad, weight, gamma, sigma, u, v, ctx.dim)
        return *first, None, None, None, None


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
    function = _CompiledWeight if torch.compiler.is_compiling() else _EffectiveWeight
    return function.apply(weight, gamma, sigma, u, v, dim)


class _ScaledLinear(torch.autograd.Function):
    """`x W_hat.T + bias` in which the GEMM multiplies by s = gamma / sigma, for nothing.

    The derivatives of `_EffectiveWeight`, but W_hat is never formed: the gradient of W is made in
    the memory of G, and `<G, W>` is read off `<dL/dx, x> / s` where that is shorter. Fused blocks
    of several scales are scaled as columns of the output. No
    `setup_context`, which costs more than a small layer and serves transforms that do not come
    here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        gamma, sigma, u, v, ctx.dim = rest
        ctx.save_for_backward(x, weight, gamma, sigma, u, v)
        ctx.scales = _read_scales(gamma, sigma)
        return _scaled_product(x, weight, bias, ctx.scales, ctx.dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, sigma, u, v = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_gamma = ctx.needs_input_grad[:4]
        by_hand = not torch.is_grad_enabled() and not is_traced(grad)
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_gamma = None
        if wants_x and by_hand:
            grad_x = _scaled_product(grad, weight, None, ctx.scales, ctx.dim, transposed=True)
        elif wants_x:
            effective = effective_weight(weight, gamma, sigma, u, v, ctx.dim)
            grad_x = grad @ (effective if ctx.dim == 0 else effective.T)
        if wants_weight or wants_gamma:
            outer = grad.T @ rows if ctx.dim == 0 else rows.T @ grad
            if not by_hand:
                grad_weight, grad_gamma = pull_back(outer, weight, gamma, sigma, u, v, ctx.dim)
            else:
                shorter = len(rows) < grad.shape[1] and len(gamma) == 1
                if grad_x is not None and shorter and ctx.scales[0]:
                    # dL/dx = s D W with G = D.T x, so <dL/dx, x> = s <G, W> = gamma dL/dgamma.
                    grad_gamma = torch.dot(grad_x.view(-1), rows.reshape(-1)).view(1) / gamma
                else:
                    grad_gamma = block_products(outer, weight, ctx.dim, len(gamma)) / sigma
                if wants_weight:
                    grad_weight = outer
                    scales = ctx.scales * (len(gamma) // len(ctx.scales))
                    write_minus_rank_one(outer, outer, scales, grad_gamma.tolist(), u, v, ctx.dim)
        return (
            grad_x.view(x.shape) if grad_x is not None else None,
            grad_weight if wants_weight else None,
            grad.sum(0) if wants_bias else None,
            grad_gamma if wants_gamma else None,
            *(None,) * 4,
        )


def _read_scales(gamma: Tensor, sigma: Tensor) -> list[float]:
    """Read back gamma / sigma of the blocks: one where all are equal, as after init="spectral"."""
    # Dividing Python's doubles rounds as float32 division does, once BLAS has cast them.
    pairs = zip(gamma.tolist(), sigma.tolist(), strict=True)
    scales = [g / s if s else math.nan for g, s in pairs]
    return scales[:1] if len(scales) > 1 and len(set(scales)) == 1 else scales


def _scaled_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: list[float],
    dim: int,
    transposed: bool = False,
) -> Tensor:
    """Return `x M + bias` for the (in, out) matrix M of scaled blocks, or `x M.T`."""
    rows = x.reshape(-1, x.shape[-1])
    matrix = weight.t() if (dim == 0) != transposed else weight
    alpha, by_block = scales[0], (len(scales), -1)
    if len(scales) > 1:  # the scales differ: the outputs are scaled, block by block
        alpha, scale = 1.0, x.new_tensor(scales).view(-1, 1)
        if transposed:
            rows = (rows.unflatten(1, by_block) * scale).flatten(1)
        else:
            output = rows @ matrix
            blocks = output.unflatten(1, by_block)
            if bias is None:
                blocks.mul_(scale)
            else:
                torch.addcmul(bias.view(by_block), blocks, scale, out=blocks)
            return output.view(*x.shape[:-1], output.shape[1])
    if bias is None:
        output = x.new_empty(len(rows), matrix.shape[1])
        torch.addmm(output, rows, matrix, beta=0, alpha=alpha, out=output)
    else:
        output = torch.addmm(bias, rows, matrix, alpha=alpha)
    return output.view(*x.shape[:-1], output.shape[1])


def scales_in_product(x: Tensor, weight: Tensor, gamma: Tensor) -> bool:
    """Say whether `scaled_linear` can be used: eager mode on a CPU, one floating dtype.

    There a scalar is read back for nothing and BLAS takes it as its alpha. Elsewhere the read
    would wait for the device, or break the graph of a tracer.
    """
    dtype = weight.dtype
    return (
        not torch.compiler.is_compiling()
        and weight.is_cpu
        and x.is_cpu
        and type(x) in _PLAIN_TYPES
        and type(weight) in _PLAIN_TYPES
        and dtype in (torch.float32, torch.float64)
        and x.dtype == dtype == gamma.dtype
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    dim: int,
) -> Tensor:
    """Return `x W_hat.T + bias` (dim 0) or `x W_hat + bias` (dim 1), twice differentiable.

    To be used where `scales_in_product` holds. Equal scales (all 1 after a patch with
    init="spectral") make one GEMM, the same as the plain layer's.

    Args:
        x: (..., in).
        weight: (out, in) for dim 0, (in, out) for dim 1; k equal blocks of outputs along `dim`.
        bias: (out,) or None.
        gamma: (k,) learnable scale of each block.
        sigma: (k,) value of `u.T W v` of each block.
        u: (k, m) left vectors, constants.
        v: (k, n) right vectors, constants.
        dim: dimension of the outputs in `weight`.

    Returns:
        (..., out).
    """
    if torch.is_grad_enabled():
        return _ScaledLinear.apply(x, weight, bias, gamma, sigma, u, v, dim)
    return _scaled_product(x, weight, bias, _read_scales(gamma, sigma), dim)

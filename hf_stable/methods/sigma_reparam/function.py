"""The function behind every sigma layer: `W_hat = gamma / sigma(W) * W`, and its derivatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hf_stable.measures.parts import WHOLE, Parts
from hf_stable.methods.sigma_reparam.part_arithmetic import (
    first_derivatives,
    is_traced,
    part_products,
    pull_back,
    scale_parts,
    sigma_of,
    write_minus_rank_one,
)

__all__ = [
    "effective_weight",
    "scale_parts",
    "scaled_linear",
    "scales_in_product",
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
        weight: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, parts: Parts
    ) -> Tensor:
        return scale_parts(weight, gamma / sigma, parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.parts = inputs[5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gamma, sigma, u, v = ctx.saved_tensors
        grad_weight, grad_gamma = pull_back(grad, weight, gamma, sigma, u, v, ctx.parts)
        return grad_weight, grad_gamma, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        weight, gamma, sigma, u, v = ctx.saved_tensors
        dweight, dgamma = tangents[:2]
        tangent = torch.zeros_like(weight)
        if dgamma is not None:
            tangent = tangent + scale_parts(weight, dgamma / sigma, ctx.parts)
        if dweight is not None:
            dsigma = sigma_of(dweight, u, v, ctx.parts)
            tangent = tangent + scale_parts(dweight, gamma / sigma, ctx.parts)
            tangent = tangent - scale_parts(weight, gamma * dsigma / sigma**2, ctx.parts)
        return tangent


class _CompiledWeight(torch.autograd.Function):
    """`_EffectiveWeight` for `torch.compile`, which would break the graph at its `jvp`."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, parts: Parts
    ) -> Tensor:
        ctx.save_for_backward(weight, gamma, sigma, u, v)
        ctx.parts = parts
        return scale_parts(weight, gamma / sigma, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gamma, sigma, u, v = ctx.saved_tensors
        # torch.compile has no second derivatives, for which sigma would be a function of W.
        first = first_derivatives(grad, weight, gamma, sigma, u, v, ctx.parts)
        return *first, None, None, None, None


def effective_weight(
    weight: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, parts: Parts = WHOLE
) -> Tensor:
    """Return `gamma / sigma * W`, differentiable (twice) in weight and gamma.

    Args:
        weight: raw weight, any shape that `local_matrices` takes, of k parts.
        gamma: (k,) learnable scale of each part.
        sigma: (k,) value of `u.T W v` of each part.
        u: (k, m) left vectors, constants.
        v: (k, n) right vectors, constants.
        parts: where the k matrices lie.

    Returns:
        A tensor like `weight`, in its dtype; the product is taken in gamma's dtype.
    """
    function = _CompiledWeight if torch.compiler.is_compiling() else _EffectiveWeight
    return function.apply(weight, gamma, sigma, u, v, parts)


class _ScaledLinear(torch.autograd.Function):
    """`x W_hat.T + bias` in which the GEMM multiplies by s = gamma / sigma, for nothing.

    The derivatives of `_EffectiveWeight`, but W_hat is never formed: the gradient of W is made in
    the memory of G, and `<G, W>` is read off `<dL/dx, x> / s` where that is shorter. Fused parts
    of several scales are scaled as columns of the output. No
    `setup_context`, which costs more than a small layer and serves transforms that do not come
    here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        gamma, sigma, u, v, ctx.parts = rest
        ctx.save_for_backward(x, weight, gamma, sigma, u, v)
        ctx.scales = _read_scales(gamma, sigma)
        return _scaled_product(x, weight, bias, ctx.scales, ctx.parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, sigma, u, v = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_gamma = ctx.needs_input_grad[:4]
        by_hand = not torch.is_grad_enabled() and not is_traced(grad)
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_gamma = None
        if wants_x and by_hand:
            grad_x = _scaled_product(grad, weight, None, ctx.scales, ctx.parts, transposed=True)
        elif wants_x:
            effective = effective_weight(weight, gamma, sigma, u, v, ctx.parts)
            grad_x = grad @ (effective if ctx.parts.dim == 0 else effective.T)
        if wants_weight or wants_gamma:
            outer = grad.T @ rows if ctx.parts.dim == 0 else rows.T @ grad
            if not by_hand:
                grad_weight, grad_gamma = pull_back(outer, weight, gamma, sigma, u, v, ctx.parts)
            else:
                shorter = len(rows) < grad.shape[1] and len(gamma) == 1
                if grad_x is not None and shorter and ctx.scales[0]:
                    # dL/dx = s D W with G = D.T x, so <dL/dx, x> = s <G, W> = gamma dL/dgamma.
                    grad_gamma = torch.dot(grad_x.view(-1), rows.reshape(-1)).view(1) / gamma
                else:
                    grad_gamma = part_products(outer, weight, ctx.parts) / sigma
                if wants_weight:
                    grad_weight = outer
                    scales = ctx.scales * (len(gamma) // len(ctx.scales))
                    write_minus_rank_one(outer, outer, scales, grad_gamma.tolist(), u, v, ctx.parts)
        return (
            grad_x.view(x.shape) if grad_x is not None else None,
            grad_weight if wants_weight else None,
            grad.sum(0) if wants_bias else None,
            grad_gamma if wants_gamma else None,
            *(None,) * 4,
        )


def _read_scales(gamma: Tensor, sigma: Tensor) -> list[float]:
    """Read back gamma / sigma of the parts: one where all are equal, as after init="spectral"."""
    # Dividing Python's doubles rounds as float32 division does, once BLAS has cast them.
    pairs = zip(gamma.tolist(), sigma.tolist(), strict=True)
    scales = [g / s if s else math.nan for g, s in pairs]
    return scales[:1] if len(scales) > 1 and len(set(scales)) == 1 else scales


def _scaled_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: list[float],
    parts: Parts,
    transposed: bool = False,
) -> Tensor:
    """Return `x M + bias` for the (in, out) matrix M of scaled parts, or `x M.T`."""
    rows = x.reshape(-1, x.shape[-1])
    matrix = weight.t() if (parts.dim == 0) != transposed else weight
    # Not a view: what a custom function returns as one, nobody may change in place.
    output = x.new_empty(*x.shape[:-1], matrix.shape[1])
    flat = output.view(rows.shape[0], matrix.shape[1])
    if len(scales) > 1:  # the scales differ: outputs are scaled after the product
        if transposed:
            rows, scale = _beside_scales(rows, scales, parts, weight.shape)
            rows = (rows * scale).view(-1, matrix.shape[0])
            torch.mm(rows, matrix, out=flat)
            return output
        parted, scale = _beside_scales(
            torch.mm(rows, matrix, out=flat), scales, parts, weight.shape
        )
        if bias is None:
            parted.mul_(scale)
        else:
            torch.addcmul(bias.view(parted.shape[1:]), parted, scale, out=parted)
    elif bias is None:
        torch.addmm(flat, rows, matrix, beta=0, alpha=scales[0], out=flat)
    else:
        torch.addmm(bias, rows, matrix, alpha=scales[0], out=flat)
    return output


def _beside_scales(
    outputs: Tensor, scales: list[float], parts: Parts, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Return a view of (rows, out), and a tensor of the scales of its parts that it takes."""
    values = outputs.new_tensor(scales)
    if len(set(parts.shares)) > 1:
        return outputs, parts.spread(values, shape).view(-1)
    # Parts of one length: nothing as long as a row is made, which counts where rows are few.
    length = outputs.shape[1] // (parts.repeats * len(scales))
    return outputs.view(-1, parts.repeats, len(scales), length), values.view(-1, 1)


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
    parts: Parts,
) -> Tensor:
    """Return `x W_hat.T + bias`, or `x W_hat + bias` for an (in, out) weight, twice differentiable.

    To be used where `scales_in_product` holds. Equal scales (all 1 after a patch with
    init="spectral") make one GEMM, the same as the plain layer's.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) where `parts.dim` is 1.
        bias: (out,) or None.
        gamma: (k,) learnable scale of each part.
        sigma: (k,) value of `u.T W v` of each part.
        u: (k, m) left vectors, constants.
        v: (k, n) right vectors, constants.
        parts: where the k matrices lie along the outputs.

    Returns:
        (..., out).
    """
    if torch.is_grad_enabled():
        return _ScaledLinear.apply(x, weight, bias, gamma, sigma, u, v, parts)
    return _scaled_product(x, weight, bias, _read_scales(gamma, sigma), parts)

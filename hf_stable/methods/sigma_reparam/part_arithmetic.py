"""Arithmetic on the parts of a weight: scales, `u.T W v`, derivatives of the effective weight.

Pure functions. A weight has k parts (one, for most), each with a gamma, a sigma and a pair of
singular vectors of its own. The vectors of all parts are the rows of u (k, m) and v (k, n), as long
as those of the largest part; a smaller one's are followed by zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_stable.measures.matrices import as_matrix, local_matrices
from hf_stable.measures.parts import Parts

__all__ = [
    "as_rows",
    "first_derivatives",
    "is_traced",
    "part_products",
    "pull_back",
    "scale_parts",
    "sigma_of",
    "vectors_of",
    "write_minus_rank_one",
]


def scale_parts(weight: Tensor, scale: Tensor, parts: Parts) -> Tensor:
    """Return each of the k parts of a weight times its entry of `scale` (k,), in W's dtype."""
    # A bfloat16 weight times a float32 scale rounds once, not twice.
    product = weight.to(scale.dtype) * parts.spread(scale, weight.shape)
    return product.to(weight.dtype)


def vectors_of(u: Tensor, v: Tensor, matrices: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the vectors of each part, views of u (k, m) and v (k, n), as long as its sides."""
    return [
        (left[: matrix.shape[0]], right[: matrix.shape[1]])
        for left, right, matrix in zip(u, v, matrices, strict=True)
    ]


def as_rows(vectors: list[Tensor]) -> Tensor:
    """Stack vectors, of which shorter ones are followed by zeros: (k, the longest)."""
    longest = max(map(len, vectors))
    return torch.stack([torch.nn.functional.pad(v, (0, longest - len(v))) for v in vectors])


def sigma_of(weight: Tensor, u: Tensor, v: Tensor, parts: Parts) -> Tensor:
    """Return `u.T W v` of each part, (k,), in the dtype of u and v."""
    matrices = local_matrices(weight, parts)
    pairs = zip(matrices, vectors_of(u, v, matrices), strict=True)
    return torch.stack([left.dot(m.to(left.dtype).mv(right)) for m, (left, right) in pairs])


def part_products(grad: Tensor, weight: Tensor, parts: Parts) -> Tensor:
    """Return `<G, W>` of each part, (k,), without a tensor of W's size."""
    if parts.is_whole:
        return torch.dot(grad.reshape(-1), weight.reshape(-1)).view(1)
    if parts.stacked or parts.dim == 0:
        pairs = zip(local_matrices(grad, parts), local_matrices(weight, parts), strict=True)
        return torch.stack([torch.dot(g.reshape(-1), w.reshape(-1)) for g, w in pairs])
    # Parts of columns: sum down the rows, some cache-sized bands of rows at a time.
    rows = max(1, 2**19 // weight.shape[1])
    bands = zip(grad.split(rows), weight.split(rows), strict=True)
    columns = torch.stack([(g * w).sum(0) for g, w in bands]).sum(0)
    return torch.stack([column.sum() for column in parts.vectors(columns)])


def pull_back(
    grad: Tensor, weight: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, parts: Parts
) -> tuple[Tensor, Tensor]:
    """Return the gradients of W and gamma for `grad`, the gradient of W_hat."""
    if torch.is_grad_enabled():
        # A second derivative is wanted: sigma must be the function of W that it is. The saved
        # value as a constant would pass gradcheck and give a wrong Hessian.
        sigma = sigma_of(weight, u, v, parts)
    return first_derivatives(grad, weight, gamma, sigma, u, v, parts)


def first_derivatives(
    grad: Tensor, weight: Tensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, parts: Parts
) -> tuple[Tensor, Tensor]:
    """Return the gradients of W and gamma, in which sigma is the number that it is."""
    grad_gamma = part_products(grad, weight, parts).to(gamma.dtype) / sigma
    return _minus_rank_one(grad, gamma / sigma, grad_gamma, u, v, parts), grad_gamma


def _minus_rank_one(
    grad: Tensor, scale: Tensor, coefficient: Tensor, u: Tensor, v: Tensor, parts: Parts
) -> Tensor:
    """Return `scale * (G - coefficient * u v.T)` part by part, shaped like G."""
    if grad.device.type == "cpu" and not torch.is_grad_enabled() and not is_traced(grad):
        result = torch.empty_like(grad, memory_format=torch.contiguous_format)
        scales, coefficients = scale.tolist(), coefficient.tolist()
        own_u, own_v = u.to(grad.dtype), v.to(grad.dtype)
        write_minus_rank_one(result, grad, scales, coefficients, own_u, own_v, parts)
        return result
    matrices = local_matrices(grad, parts)
    outer = [torch.outer(left, right) for left, right in vectors_of(u, v, matrices)]
    if len(outer) == 1:
        rank_one = (coefficient * outer[0]).view(grad.shape)
    else:
        rank_one = _together(outer, grad, parts) * parts.spread(coefficient, grad.shape)
    return ((grad.to(u.dtype) - rank_one) * parts.spread(scale, grad.shape)).to(grad.dtype)


def _together(matrices: list[Tensor], like: Tensor, parts: Parts) -> Tensor:
    """Put matrices together to the weight whose parts they are, shaped like one."""
    per_one, dim = len(parts.shares), parts.dim
    if parts.repeats > 1:
        matrices = [matrix.unflatten(dim, (parts.repeats, -1)) for matrix in matrices]
        dim += 1
    ones = [torch.cat(matrices[i : i + per_one], dim) for i in range(0, len(matrices), per_one)]
    ones = [one.flatten(parts.dim, dim) if parts.repeats > 1 else one for one in ones]
    return torch.stack(ones) if parts.stacked else ones[0].view(like.shape)


def write_minus_rank_one(
    result: Tensor,
    grad: Tensor,
    scales: list[float],
    coefficients: list[float],
    u: Tensor,
    v: Tensor,
    parts: Parts,
) -> None:
    """Write `_minus_rank_one` to `result`, which may be `grad`, in one pass; on a CPU only."""
    if parts.is_whole:
        out, own, left, right = (as_matrix(result), as_matrix(grad), u.view(-1), v.view(-1))
        scale, factor = _in_range(scales[0], out), _in_range(-scales[0] * coefficients[0], out)
        torch.addr(own, left, right, beta=scale, alpha=factor, out=out)
        return
    outs, grads = (_views(tensor, parts) for tensor in (result, grad))
    shapes = parts.shapes(grad.shape if parts.stacked else (len(grad), grad[0].numel()))
    for out, own, s, c, left, right, (height, width) in zip(
        outs, grads, scales, coefficients, u, v, shapes, strict=True
    ):
        left, right = left[:height], right[:width]
        scale, factor = _in_range(s, out), _in_range(-s * c, out)
        if not parts.is_interleaved:
            torch.addr(own, left, right, beta=scale, alpha=factor, out=out)
            continue
        sides = [left.view(-1, 1, 1), right.view(1, 1, -1)]
        sides[parts.dim] = (left, right)[parts.dim].view(
            (parts.repeats, -1, 1) if parts.dim == 0 else (1, parts.repeats, -1)
        )
        torch.mul(own, scale, out=out)
        out.addcmul_(*sides, value=factor)


def _views(weight: Tensor, parts: Parts) -> list[Tensor]:
    return parts.views(weight if parts.stacked else as_matrix(weight))


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

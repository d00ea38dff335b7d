"""`W_hat = gamma / sigma(W) * W` for a weight that processes share: each scales what it holds.

Under tensor parallelism the weight stays cut in the forward (FSDP2 gathers it first, and needs
nothing of this). Scaling takes no exchange. The backward takes one number for each part of the
weight: `<dL/dW_hat, W>` is a sum over all of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from hf_stable.measures.matrices import spread_values
from hf_stable.measures.matrix_shards import as_local_matrix, groups_of, pieces_of
from hf_stable.measures.parts import Parts

__all__ = ["shared_effective_weight"]


class _SharedWeight(torch.autograd.Function):
    """`_EffectiveWeight` on the local part of a weight; the same derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        gamma: Tensor,
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        weight: DTensor,
        parts: Parts,
    ) -> Tensor:
        ctx.save_for_backward(local, gamma, sigma, u, v)
        ctx.weight, ctx.parts = weight.detach(), parts
        scale = spread_values(gamma / sigma, weight, parts)
        return (local.to(scale.dtype) * scale).to(local.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        local, gamma, sigma, u, v = ctx.saved_tensors
        weight, parts = ctx.weight, ctx.parts
        pieces = pieces_of(weight, parts)
        whole_grad, whole = (as_local_matrix(each, parts) for each in (grad, local))
        products = [
            torch.sum(piece.take(whole_grad) * piece.take(whole), dtype=gamma.dtype)
            for piece in pieces
        ]
        sums = torch.stack(products)
        for group in groups_of(weight):
            dist.all_reduce(sums, group=group)
        grad_gamma = sums / sigma
        rank_one = torch.zeros_like(whole_grad, dtype=gamma.dtype)
        for piece, coefficient, left, right in zip(pieces, grad_gamma, u, v, strict=True):
            height, width = piece.shape
            outer = torch.outer(left[:height][piece.rows], right[:width][piece.columns])
            piece.put(rank_one, coefficient * outer)
        scale = spread_values(gamma / sigma, weight, parts)
        grad_weight = (grad - rank_one.view(grad.shape)) * scale
        return grad_weight.to(grad.dtype), grad_gamma, *(None,) * 5


def shared_effective_weight(
    weight: DTensor, gamma: Tensor, sigma: Tensor, u: Tensor, v: Tensor, parts: Parts
) -> DTensor:
    """Return `gamma / sigma * W`, differentiable once in weight and gamma.

    Every process that holds some of the weight has to call it, and its backward.

    Args:
        weight: raw weight, sharded or replicated.
        gamma: (k,) learnable scale of each part, the same on every process, as its gradient is.
        sigma: (k,) value of `u.T W v` of each part.
        u: (k, m) left vectors of the whole parts, constants.
        v: (k, n) right vectors, constants.
        parts: where the k matrices lie in the whole weight.

    Returns:
        A tensor placed like `weight`, in its dtype; the product is taken in gamma's dtype.
    """
    local = _SharedWeight.apply(weight.to_local(), gamma, sigma, u, v, weight, parts)
    return DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )

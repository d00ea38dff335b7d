"""Sharpness: the largest eigenvalue of the loss's Hessian, by Hessian-vector products.

Pure torch; works for any closure that returns a loss. Above an optimizer's threshold the loss
goes up along the sharpest direction instead of down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

__all__ = ["Sharpness", "adam_preconditioner", "measure_sharpness", "sharpness_threshold"]


class Sharpness(NamedTuple):
    """A measured top eigenvalue, how many Hessian products it took, and whether it converged."""

    value: float
    num_products: int
    converged: bool


def sharpness_threshold(lr: float, beta1: float | None = None) -> float:
    """Return the sharpness above which training is unstable.

    Gradient descent on a quadratic diverges above `2 / lr`. Adam does so where the preconditioned
    Hessian `P^-1 H` is above `(2 + 2 beta1) / ((1 - beta1) lr)`, which is `38 / lr` at 0.9 (Cohen
    et al. 2022, "Adaptive gradient methods at the edge of stability").

    Args:
        lr: the learning rate of this step.
        beta1: Adam's, with `measure_sharpness(..., preconditioner=adam_preconditioner(...))`;
            None for gradient descent and the plain Hessian.
    """
    return 2 / lr if beta1 is None else (2 + 2 * beta1) / ((1 - beta1) * lr)


@torch.no_grad()
def adam_preconditioner(optimizer: Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    """Return the diagonal P by which Adam divides, from the optimizer's state.

    `P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps)` (Cohen et al. 2022), for any optimizer
    that keeps `exp_avg_sq` and `step` as torch's Adam does: Adam, AdamW, AdamW2.

    Args:
        optimizer: after at least one step.
        params: the parameters that the Hessian is taken of.

    Returns:
        One tensor per parameter, of its shape.

    Raises:
        ValueError: if the optimizer does not own a parameter, or has not stepped it.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    diagonal = []
    for param in params:
        state = optimizer.state.get(param, {})
        if id(param) not in groups or "exp_avg_sq" not in state:
            raise ValueError(
                f"{type(optimizer).__name__} has no second moment for a parameter of shape "
                f"{tuple(param.shape)}: pass parameters that an Adam-like optimizer has stepped"
            )
        group, step = groups[id(param)], float(state["step"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt()
        diagonal.append((root + group["eps"]) * (1 - beta1**step))
    return diagonal


def measure_sharpness(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    *,
    preconditioner: Sequence[Tensor] | None = None,
    max_products: int = 30,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Sharpness:
    """Compute the largest eigenvalue of the Hessian H of a loss, or of P^-1 H.

    Lanczos iteration on Hessian-vector products; of its vectors it keeps two, since for the
    leading eigenvalue lost orthogonality does no harm. P^-1 H is taken as the symmetric
    `P^-1/2 H P^-1/2`, which has the same eigenvalues.

    Cost: one forward and one backward that keep their graphs (about twice the memory of a
    training step), then about two backwards per product, and four vectors of the length of all
    parameters. Attention runs without its fused kernels, which have no second derivative. No
    `.grad` changes, and the random numbers that the loss draws are given back.

    Args:
        loss_fn: evaluates the model and returns a scalar loss; called once, so that dropout is the
            same for every product.
        params: what the Hessian is taken with respect to. One that needs no gradient is an error,
            since it would have to be left out of P too.
        preconditioner: the positive diagonal P, such as `adam_preconditioner` returns.
        max_products: bound on Hessian-vector products.
        tolerance: stop when the eigenvalue is certain to this share of itself.
        generator: CPU generator for the start vector; by default one of its own, so that the
            measurement repeats.

    Returns:
        `Sharpness`; the value is signed: negative where the loss curves downwards everywhere.
        NaN for a non-finite loss or Hessian.

    Raises:
        ValueError: if there are no parameters, one needs no gradient or is sharded (FSDP gathers
            weights in a way that has no second derivative), or P does not fit.
    """
    params = list(params)
    _check_params(params, preconditioner)
    device = params[0].device
    devices = [p.device for p in params if p.is_cuda]
    with torch.random.fork_rng(sorted({d.index for d in devices})), _twice_differentiable():
        loss = loss_fn()
        gradients = torch.autograd.grad(
            loss, params, create_graph=True, allow_unused=True, materialize_grads=True
        )
    if not any(gradient.requires_grad for gradient in gradients):
        return Sharpness(0.0, 0, True)  # a loss that is linear in the parameters
    scale = None if preconditioner is None else _flatten(preconditioner).rsqrt()
    product = partial(_times_hessian, gradients, params, scale)
    generator = generator or torch.Generator().manual_seed(0)
    start = torch.randn(sum(p.numel() for p in params), generator=generator)
    # Under gradient checkpointing each product runs attention again.
    with _twice_differentiable():
        return _lanczos(product, start.to(device), max_products, tolerance)


def _times_hessian(
    gradients: Sequence[Tensor], params: Sequence[Tensor], scale: Tensor | None, vector: Tensor
) -> Tensor:
    """Return the product of the Hessian with a vector, as long as all parameters together.

    Args:
        gradients: of the loss, with their graphs.
        params: what they were taken with respect to.
        scale: `P^-1/2`, if the product is to be that of `P^-1/2 H P^-1/2`.
        vector: what is multiplied.
    """
    vector = vector if scale is None else vector * scale
    parts = vector.split([p.numel() for p in params])
    along = [part.view_as(p) for part, p in zip(parts, params, strict=True)]
    pairs = [(g, a) for g, a in zip(gradients, along, strict=True) if g.requires_grad]
    result = torch.autograd.grad(
        [g for g, _ in pairs],
        params,
        grad_outputs=[a.to(g) for g, a in pairs],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    flat = _flatten(result)
    return flat if scale is None else flat * scale


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Compute gradients, attention by the kernel that has second derivatives."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def _lanczos(
    product: Callable[[Tensor], Tensor], vector: Tensor, max_products: int, tolerance: float
) -> Sharpness:
    """Return the largest eigenvalue of a symmetric operator.

    Apart from the iterations on matrices: eigenvalues have signs, and its vectors are as long as
    all parameters together, so that two of them are all that is kept.
    """
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    vector = vector / torch.linalg.vector_norm(vector)
    previous = torch.zeros_like(vector)
    value = float("nan")
    for count in range(1, max_products + 1):
        image = product(vector).to(vector.dtype)
        diagonal.append(torch.dot(vector, image).item())
        image = image - diagonal[-1] * vector
        if off_diagonal:
            image -= off_diagonal[-1] * previous
        residual = torch.linalg.vector_norm(image).item()
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off_diagonal:
            side = torch.tensor(off_diagonal, dtype=torch.float64)
            tridiagonal += torch.diag(side, 1) + torch.diag(side, -1)
        if not tridiagonal.isfinite().all() or residual != residual:
            return Sharpness(float("nan"), count, False)
        values, vectors = torch.linalg.eigh(tridiagonal)
        value = values[-1].item()
        # An eigenvalue lies within this distance of the Ritz value.
        error = residual * abs(vectors[-1, -1].item())
        largest = values.abs().max().item()
        if error <= tolerance * abs(value) or residual <= 1e-6 * largest:
            return Sharpness(value, count, True)
        off_diagonal.append(residual)
        previous, vector = vector, image / residual
    return Sharpness(value, max_products, False)


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.cat([tensor.detach().to(dtype).flatten() for tensor in tensors])


def _check_params(params: Sequence[Tensor], preconditioner: Sequence[Tensor] | None) -> None:
    if not params:
        raise ValueError("there are no parameters to take the Hessian of")
    for param in params:
        if isinstance(param, DTensor):
            raise ValueError(
                "cannot take the Hessian of sharded parameters: FSDP gathers them in a way that "
                "has no second derivative; measure sharpness on an unsharded copy"
            )
        if not param.requires_grad:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} needs no gradient; pass only those "
                "with requires_grad"
            )
    if preconditioner is not None and [p.shape for p in preconditioner] != [
        p.shape for p in params
    ]:
        raise ValueError("the preconditioner needs one tensor per parameter, of the same shape")

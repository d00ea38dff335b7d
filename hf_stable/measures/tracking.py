"""Largest singular values of weights that are measured again and again while they train.

Pure torch. A weight moves little between two probes, so from the last time's leading vectors a few
products with it are enough; a small block of vectors follows those that may overtake the first.
Apart from `leading`: many matrices go together, by their values alone, and products are not formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BLOCK_SIZE", "leading_sigmas", "start_vectors"]

BLOCK_SIZE = 4
"""Vectors followed for each matrix: the leading ones, and a generic one for what is new."""

MAX_BASIS = 48
"""Vectors kept for each matrix before the iteration is restarted from the best of them."""

MAX_SWEEPS = 8


def start_vectors(num_columns: int, like: Tensor, stage: int = 0) -> Tensor:
    """Return generic vectors (BLOCK_SIZE, num_columns) that no structured one is orthogonal to.

    Args:
        num_columns: of the matrix.
        like: has the dtype and the device that are wanted.
        stage: another number gives other vectors.
    """
    generator = torch.Generator().manual_seed(num_columns + 1_000_003 * stage)
    return torch.randn(BLOCK_SIZE, num_columns, generator=generator).to(like)


@torch.no_grad()
def leading_sigmas(
    matrices: Sequence[Sequence[Tensor]], starts: Tensor, *, tolerance: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Compute the largest singular values of matrices with equally many columns.

    Block Lanczos iteration on A^T A with full orthogonalisation, restarted from its best block.
    A stage takes two passes over every matrix, with `BLOCK_SIZE` vectors at once, and one host
    synchronisation. It ends when the last stage has raised no value by more than the tolerance: of
    a matrix whose first singular value stands out the value is then right to rounding, of one with
    many close ones to a few times the tolerance. Never above the true one beyond rounding.

    Args:
        matrices: n of them, each as a product that is never formed, the leftmost factor first:
            `[w]` or, for W2 W1, `[w2, w1]`. At least `2 BLOCK_SIZE` columns.
        starts: (n, BLOCK_SIZE, columns), what the last call returned, or `start_vectors`. Their
            dtype, float32 or float64, is that of the computation.
        tolerance: of each value, as a share of it.

    Returns:
        The values (n,), 0 for a zero product and NaN for a non-finite one or a square that
        overflows, and the vectors to start from next time.
    """
    num_columns = starts.shape[2]
    num_stages = max(2, min(MAX_BASIS, num_columns) // BLOCK_SIZE)
    generic = start_vectors(num_columns, starts)
    square = starts.new_zeros(len(starts))
    for _ in range(MAX_SWEEPS):
        basis = images = starts[:, :0]
        # The last vector of a block is the least settled: it makes room for a generic one.
        block = torch.cat([starts[:, :-1], generic[:1].expand(len(starts), -1, -1)], 1)
        settled = False
        for stage in range(num_stages):
            new = start_vectors(num_columns, starts, stage + 1)
            block = _orthonormal_beyond(basis, block, new)
            image = torch.stack(
                [_gram_product(*pair) for pair in zip(matrices, block, strict=True)]
            )
            basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
            finite = ((images * 0).sum((1, 2)) == 0)[:, None, None]
            projected = torch.where(finite, basis @ images.mT, 0.0)
            projected = (projected + projected.mT) / 2
            largest = torch.linalg.eigvalsh(projected)[:, -1].clamp_min(0)
            before, square, block = square, largest, image
            settled = bool(stage) and bool((square - before <= 2 * tolerance * square).all())
            if settled:
                break
        best = torch.linalg.eigh(projected).eigenvectors[..., -BLOCK_SIZE:].flip(-1).mT
        starts = torch.where(finite, best @ basis, generic)
        if settled or basis.shape[1] == num_columns:
            break
    return square.sqrt().masked_fill(~finite[:, 0, 0], math.nan), starts


def _gram_product(factors: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return the rows times A^T A, for A the product of the factors.

    With the vectors as rows a CPU takes a quarter of the time that it takes with columns.
    """
    for factor in reversed(factors):
        rows = rows @ factor.mT
    for factor in factors:
        rows = rows @ factor
    return rows


def _orthonormal_beyond(basis: Tensor, block: Tensor, generic: Tensor) -> Tensor:
    """Return orthonormal rows for what a block adds to a basis, filled up by generic directions."""
    length = torch.linalg.vector_norm(block, dim=2, keepdim=True)
    block = (block / length.clamp_min(torch.finfo(block.dtype).tiny)).nan_to_num(0.0)
    block, triangle = torch.linalg.qr((block - block @ basis.mT @ basis).mT)
    # What is left of a vector that the basis holds is rounding.
    left = triangle.diagonal(dim1=-2, dim2=-1).abs()[..., None]
    block = torch.where(left > 100 * torch.finfo(block.dtype).eps, block.mT, generic)
    # Orthogonality lost in one pass of Gram-Schmidt is regained in the next.
    for _ in range(2):
        block = torch.linalg.qr((block - block @ basis.mT @ basis).mT).Q.mT
    return block.contiguous()

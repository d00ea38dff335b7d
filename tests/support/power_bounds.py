"""How late power iteration may be, by proof; every bound is computed from the matrices at hand."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-5
"""Relative error of sigma in float32: sums of at most 64 products, each rounded to 6e-8."""


def tracked_at_least(exact: Tensor, way: Tensor) -> Tensor:
    """Return what one iteration a step leaves of sigma_1, for a matrix that has come a way.

    With D the step, `s = |W.T u| >= |W v|` for the new s, since |W v|^2 = v.T (W.T W v) and W v is
    a multiple of u; and `|W v| >= s_old - |D|` while `sigma_1 <= sigma_1_old + |D|` (Weyl). So the
    difference grows by at most 2 |D| in a step, and is at most twice the way since it was zero.

    Args:
        exact: sigma_1 of the matrix now.
        way: sum of the spectral norms of the steps since sigma was exact.
    """
    return exact * (1 - ROUNDING) - 2 * way


def converged_at_least(matrix: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Return the least that power iteration gives for sigma_1 of a matrix, whatever its spectrum.

    With x_i = (sigma_i / sigma_1)^2 and a the coordinates of the start in the right singular
    vectors, k iterations give `sigma^2 / sigma_1^2 = sum a_i^2 x_i^2k / sum a_i^2 x_i^(2k-1)`. One
    minus that is at most tan^2(a, v_1) times the largest x^m (1 - x), m = 2k - 1, which stands at
    x = m / (m + 1).

    Args:
        matrix: (m, n).
        start: right vector (n,), of any length.
        iterations: k.
    """
    _, sigmas, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    cosine = (right[0] @ start.double()).abs() / torch.linalg.vector_norm(start.double())
    power = 2 * iterations - 1
    most = (power / (power + 1)) ** power / (power + 1)
    short = (cosine**-2 - 1) * most
    return sigmas[0] * (1 - short).clamp_min(0).sqrt() * (1 - ROUNDING)

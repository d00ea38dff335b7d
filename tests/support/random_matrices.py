"""Matrices and vectors of known seeds and spectra, and what a leading triple of one has to be."""

from __future__ import annotations

import pytest
import torch

from hf_stable.measures.leading import EXACT_SVD_MAX_DIM
from hf_stable.measures.matrices import spectral_dtype

LARGE = EXACT_SVD_MAX_DIM + 1

# Of sigma, relative: some hundred roundings in sums of a few hundred terms.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(size, seed=0, dtype=torch.float32):
    vector = randn(size, seed=seed, dtype=dtype)
    return vector / vector.norm()


def with_singular_values(values, rows, columns, dtype=torch.float32):
    left = torch.linalg.qr(randn(rows, len(values), seed=1, dtype=torch.float64))[0]
    right = torch.linalg.qr(randn(columns, len(values), seed=2, dtype=torch.float64))[0]
    return (left * torch.tensor(values, dtype=torch.float64) @ right.T).to(dtype)


def exact_sigma(matrix):
    return torch.linalg.svdvals(matrix.double())[0].item()


def assert_is_leading(matrix, triple, vector_tolerance=1e-3):
    """sigma is the largest singular value and u, v are vectors of it."""
    dtype = spectral_dtype(matrix.dtype)
    sigma, u, v = triple
    assert sigma.dtype == u.dtype == v.dtype == dtype
    assert sigma.shape == () and u.shape == matrix.shape[:1] and v.shape == matrix.shape[1:]
    expected = exact_sigma(matrix)
    assert sigma.item() == pytest.approx(expected, rel=TOLERANCE[dtype])
    for vector in (u, v):
        assert vector.norm().item() == pytest.approx(1, rel=TOLERANCE[dtype])
    matrix = matrix.double()
    # The error of a vector is the square root of the error of its Rayleigh quotient.
    assert (matrix @ v.double() - expected * u).norm() <= vector_tolerance * expected
    assert (matrix.T @ u.double() - expected * v).norm() <= vector_tolerance * expected


SHAPES = [
    (7, 5), (40, 3), (3, 40), (1, 9), (9, 1), (1, 1), (1, 500), (500, 1), (LARGE, LARGE),
    (300, 200), (200, 300), (2 * LARGE, LARGE - 2),
]  # fmt: skip

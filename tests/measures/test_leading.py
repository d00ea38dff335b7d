"""Leading singular triples against an SVD in float64."""

from __future__ import annotations

import math

import pytest
import torch
from random_matrices import (
    SHAPES,
    assert_is_leading,
    randn,
    unit,
    with_singular_values,
)

from hf_stable.measures.leading import leading_triple


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_triple_equals_the_svd(shape, dtype):
    matrix = randn(*shape, dtype=dtype)
    assert_is_leading(matrix, leading_triple(matrix))


def test_another_direction_falls_short_of_sigma():
    matrix = randn(200, 300)
    v = unit(300)
    assert (matrix @ v).norm() < 0.9 * leading_triple(matrix).sigma


@pytest.mark.parametrize("shape", [(6, 9), (200, 150)], ids=str)
def test_rank_one_gives_the_product_of_the_norms(shape):
    left, right = randn(shape[0], seed=3), randn(shape[1], seed=4)
    triple = leading_triple(torch.outer(left, right))
    assert triple.sigma.item() == pytest.approx((left.norm() * right.norm()).item(), rel=3e-6)
    assert abs(triple.u @ left).item() == pytest.approx(left.norm().item(), rel=3e-6)
    assert abs(triple.v @ right).item() == pytest.approx(right.norm().item(), rel=3e-6)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-4, 1e-2])
@pytest.mark.parametrize("size", [40, 200])
def test_near_equal_leading_values_give_sigma_and_a_vector_of_their_space(size, gap):
    values = [1.0, 1.0 - gap, *torch.linspace(0.9, 0.1, 30).tolist()]
    matrix = with_singular_values(values, size, size + 10)
    assert_is_leading(matrix, leading_triple(matrix))


@pytest.mark.parametrize("shape", [(4, 6), (150, 200)], ids=str)
def test_a_zero_matrix_has_sigma_zero_and_unit_vectors(shape):
    triple = leading_triple(torch.zeros(shape))
    assert triple.sigma == 0
    assert triple.u.norm().item() == pytest.approx(1) and triple.v.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(4, 6), (150, 200)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_matrix_is_refused(shape, value):
    matrix = randn(*shape)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        leading_triple(matrix)


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="non-empty"):
        leading_triple(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    matrix = randn(150, 200).to(dtype)
    triple = leading_triple(matrix)
    assert_is_leading(matrix, triple)
    assert torch.equal(triple.sigma, leading_triple(matrix.float()).sigma)
    assert triple.sigma != triple.sigma.to(dtype).float()  # rounding to dtype would be seen


@pytest.mark.parametrize("shape", [(20, 30), (150, 200)], ids=str)
def test_autocast_changes_nothing(shape):
    matrix = randn(*shape)
    plain = leading_triple(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        inside = leading_triple(matrix)
        assert (matrix @ matrix.T).dtype == torch.bfloat16  # autocast is really on
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("shape", [(2, 3, 12, 7), (3, 150, 140)], ids=str)
def test_a_batch_equals_its_matrices(shape):
    matrices = randn(*shape)
    batch = leading_triple(matrices)
    flat = [part.flatten(0, len(shape) - 3) for part in batch]
    assert batch.sigma.shape == shape[:-2]
    for index, matrix in enumerate(matrices.flatten(0, -3)):
        single = leading_triple(matrix)
        for mine, alone in zip(flat, single, strict=True):
            torch.testing.assert_close(mine[index], alone, rtol=1e-5, atol=1e-5)


def test_a_strided_view_is_as_good_and_a_repeat_is_identical():
    matrix = randn(170, 450)[:, 150:300]
    assert not matrix.is_contiguous()
    first, again = leading_triple(matrix), leading_triple(matrix)
    assert_is_leading(matrix, first)
    assert_is_leading(matrix.T, leading_triple(matrix.T))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [(20, 20), (200, 150)], ids=["svd", "lanczos"])
def test_entries_whose_squares_leave_float32(size, shape):
    matrix = randn(*shape)
    usual, extreme = leading_triple(matrix), leading_triple(matrix * size)
    assert extreme.sigma.item() == pytest.approx(size * usual.sigma.item(), rel=1e-5)
    torch.testing.assert_close(extreme.v, usual.v, rtol=0, atol=1e-4)

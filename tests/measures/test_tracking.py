"""Largest singular values of moving matrices against an SVD in float64."""

from __future__ import annotations

import math

import pytest
import torch

from hf_stable.measures import tracking as sigma_tracking
from hf_stable.measures.tracking import BLOCK_SIZE, leading_sigmas, start_vectors


def weight(rows, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype)


def exact(*factors):
    return torch.linalg.matrix_norm(torch.linalg.multi_dot([*map(torch.Tensor.double, factors)])
                                    if len(factors) > 1 else factors[0].double(), 2)  # fmt: skip


def cold(num_columns, count, dtype=torch.float32):
    like = torch.empty(0, dtype=dtype)
    return start_vectors(num_columns, like).expand(count, -1, -1)


@pytest.fixture
def stages(monkeypatch):
    """The shapes of what each stage multiplies a matrix with."""
    shapes = []

    def counted(factors, rows, original=sigma_tracking._gram_product):
        shapes.append(tuple(rows.shape))
        return original(factors, rows)

    monkeypatch.setattr(sigma_tracking, "_gram_product", counted)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_equal_the_svd(dtype):
    matrices = [
        [weight(64, 40, 1, dtype)],
        [weight(40, 160, 2, dtype), weight(160, 40, 3, dtype)],
        [weight(64, 1, 4, dtype) @ weight(1, 40, 5, dtype)],
        [torch.eye(40, dtype=dtype)],
        [weight(40, 70, 6, dtype).T],
    ]
    sigmas, vectors = leading_sigmas(matrices, cold(40, 5, dtype), tolerance=1e-6)
    assert sigmas.dtype == dtype and vectors.shape == (5, BLOCK_SIZE, 40)
    expected = torch.stack([exact(*factors) for factors in matrices])
    torch.testing.assert_close(sigmas.double(), expected, rtol=5e-6, atol=0)
    assert (sigmas <= expected * (1 + 1e-6)).all()


def test_a_value_that_overtakes_another_is_followed():
    size = 160
    u, v = (torch.linalg.qr(weight(size, size, seed)).Q for seed in (1, 2))
    noise, start = 0.02 * weight(size, size, 3), cold(size, 1)
    for probe in range(36):  # the second one grows by a tenth at each, out of the noise
        second = 0.3 * 1.1**probe
        matrix = 2 * torch.outer(u[0], v[0]) + second * torch.outer(u[1], v[1]) + noise
        (sigma,), start = leading_sigmas([[matrix]], start)
        torch.testing.assert_close(sigma.double(), exact(matrix), rtol=2e-6, atol=0)
    assert sigma > 8


def test_many_close_values_are_right_to_a_few_times_the_tolerance():
    matrix, start = weight(512, 160), cold(160, 1)
    for probe in range(4):
        matrix = matrix + 0.05 * weight(512, 160, 10 + probe)
        (sigma,), start = leading_sigmas([[matrix]], start, tolerance=1e-5)
        torch.testing.assert_close(sigma.double(), exact(matrix), rtol=5e-5, atol=0)


def test_a_warm_start_saves_most_stages_and_no_product_is_formed(stages):
    w2, w1 = weight(160, 200, 1), weight(200, 160, 2)
    _, start = leading_sigmas([[w2, w1]], cold(160, 1))
    num_cold = len(stages)
    stages.clear()
    moved = w1 + 1e-4 * weight(200, 160, 3)
    (sigma,), _ = leading_sigmas([[w2, moved]], start)
    torch.testing.assert_close(sigma.double(), exact(w2, moved), rtol=2e-5, atol=0)
    assert 2 <= len(stages) <= num_cold / 3
    assert set(stages) == {(BLOCK_SIZE, 160)}


def test_zero_and_non_finite_matrices_spoil_no_other_and_heal():
    fine, spoilt = weight(50, 40, 1), weight(50, 40, 2)
    spoilt[3, 3] = math.nan
    matrices = [[torch.zeros(50, 40)], [fine], [spoilt], [fine * 1e25]]
    sigmas, start = leading_sigmas(matrices, cold(40, 4))
    assert sigmas[0] == 0 and sigmas[2:].isnan().all() and start.isfinite().all()
    torch.testing.assert_close(sigmas[1].double(), exact(fine), rtol=2e-5, atol=0)
    healed, _ = leading_sigmas([[fine]] * 4, start)
    torch.testing.assert_close(healed.double(), exact(fine).expand(4), rtol=2e-5, atol=0)


def test_start_vectors_that_see_nothing_are_no_hindrance():
    matrix = torch.diag(torch.tensor([3.0, 2.0] + [0.0] * 38))
    blind = torch.eye(40)[None, -BLOCK_SIZE:]
    (sigma,), _ = leading_sigmas([[matrix]], blind)
    assert sigma == pytest.approx(3.0, rel=1e-6)

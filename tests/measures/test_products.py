"""Spectra of products against an SVD of the product itself, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from hf_stable import spectral
from hf_stable.measures.products import (
    ov_singular_values,
    qk_singular_values,
    spectral_energy_concentration,
    spectral_energy_curve,
    stable_rank,
)


def weight(rows, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype)


def test_spectral_offers_the_names_as_its_own():
    assert spectral.qk_singular_values is qk_singular_values
    assert spectral.spectral_energy_concentration is spectral_energy_concentration


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "size", "d"),
    [(4, 4, 8, 32), (4, 2, 8, 32), (6, 1, 5, 30), (2, 2, 8, 5)],
)
def test_head_spectra_equal_the_svd_of_the_product(num_heads, kv_heads, size, d, dtype):
    wq, wk = weight(num_heads * size, d, 1, dtype), weight(kv_heads * size, d, 2, dtype)
    wo, wv = weight(d, num_heads * size, 3, dtype), weight(kv_heads * size, d, 4, dtype)
    count = min(size, d)
    qk, ov = qk_singular_values(wq, wk, num_heads), ov_singular_values(wo, wv, num_heads)
    assert qk.shape == ov.shape == (num_heads, count)
    assert qk.dtype == torch.promote_types(dtype, torch.float32)
    # Relative to the largest value: rounding of two QR factorisations and one SVD.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for head in range(num_heads):
        rows = slice(head * size, (head + 1) * size)
        shared = head // (num_heads // kv_heads)
        kv_rows = slice(shared * size, (shared + 1) * size)
        for got, product in (
            (qk[head], wq[rows].double().T @ wk[kv_rows].double()),
            (ov[head], wo[:, rows].double() @ wv[kv_rows].double()),
        ):
            expected = torch.linalg.svdvals(product)[:count]
            torch.testing.assert_close(
                got.double() / expected[0], expected / expected[0], atol=tolerance, rtol=0
            )


def test_heads_differ_and_a_spoilt_head_spoils_no_other():
    wq, wk = weight(32, 32, 1), weight(16, 32, 2)
    clean = qk_singular_values(wq, wk, 4)
    assert clean[0].sub(clean[1]).abs().max() > 0.1
    wk[3, 5] = math.nan  # key head 0: query heads 0 and 1 read it
    spoilt = qk_singular_values(wq, wk, 4)
    assert spoilt[:2].isnan().all()
    assert torch.equal(spoilt[2:], clean[2:])
    wq[31, 0] = math.inf
    assert qk_singular_values(wq, wk, 4)[3].isnan().all()


def test_fused_conv1d_weight_in_its_parts():
    fused = weight(32, 96)  # GPT-2's c_attn: (in, 3 * out)
    wq, wk, _ = (part.T for part in spectral.matrices_of(fused, spectral.Parts((1, 1, 1), dim=1)))
    expected = torch.linalg.svdvals(fused[:, 8:16].double() @ fused[:, 40:48].double().T)[:8]
    torch.testing.assert_close(
        qk_singular_values(wq, wk, 4)[1].double(), expected, rtol=2e-6, atol=2e-5
    )


@pytest.mark.parametrize(
    ("wq", "wk", "num_heads", "message"),
    [
        (weight(32, 16), weight(32, 16), 5, "into 5 heads"),
        (weight(32, 16), weight(12, 16), 4, "heads of size 8"),
        (weight(32, 16), weight(24, 16), 4, "divides 4"),
    ],
)
def test_heads_that_do_not_fit_are_refused(wq, wk, num_heads, message):
    with pytest.raises(ValueError, match=message):
        qk_singular_values(wq, wk, num_heads)


def test_concentration_and_stable_rank():
    values = torch.tensor([[4.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(
        spectral_energy_concentration(values, 1), torch.tensor([16 / 21, 1 / 4])
    )
    torch.testing.assert_close(
        spectral_energy_concentration(values, 2), torch.tensor([20 / 21, 1 / 2])
    )
    assert spectral_energy_concentration(values, 4).tolist() == [1, 1]
    assert torch.equal(
        spectral_energy_concentration(values.flip(-1), 2), spectral_energy_concentration(values, 2)
    )
    torch.testing.assert_close(stable_rank(values), torch.tensor([21 / 16, 4.0]))
    huge = spectral_energy_concentration(values * 1e30, 1)
    torch.testing.assert_close(huge, torch.tensor([16 / 21, 1 / 4]))
    assert spectral_energy_concentration(torch.zeros(2, 4), 1).isnan().all()
    assert stable_rank(torch.zeros(4)).isnan()


@pytest.mark.parametrize("size", [1, 4, 6, 64])
def test_the_curve_of_concentration_is_that_of_the_powers_of_two(size):
    values = torch.rand(3, size, generator=torch.Generator().manual_seed(0))
    curve = spectral_energy_curve(values)
    sizes = [s for s in (1, 2, 4, 8, 16, 32, 64) if s <= size]
    expected = [spectral_energy_concentration(values, s) for s in sizes]
    torch.testing.assert_close(curve, torch.stack(expected, -1))
    assert spectral_energy_curve(torch.zeros(size)).isnan().all()


@pytest.mark.parametrize("s", [0, 5])
def test_concentration_refuses_a_count_out_of_range(s):
    with pytest.raises(ValueError, match="between 1 and the 4"):
        spectral_energy_concentration(torch.ones(3, 4), s)

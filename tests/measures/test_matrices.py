"""Weights as matrices: plain, fused, of kernels, and sharded."""

from __future__ import annotations

import pytest
import torch
from random_matrices import (
    assert_is_leading,
    randn,
)

from hf_stable.measures.leading import leading_triple
from hf_stable.measures.matrices import (
    as_matrix,
    matrices_of,
)
from hf_stable.measures.parts import Parts


def test_a_kernel_is_flattened_and_a_transpose_swaps_the_vectors():
    kernel = randn(12, 3, 4, 4)
    (block,) = matrices_of(kernel)
    assert block.shape == (12, 48) and block.data_ptr() == kernel.data_ptr()
    triple = leading_triple(block)
    assert_is_leading(kernel.reshape(12, 48), triple)
    flipped = leading_triple(block.T)
    torch.testing.assert_close(flipped.sigma, triple.sigma)
    torch.testing.assert_close(abs(flipped.u @ triple.v), torch.tensor(1.0))


def test_as_matrix_views_and_refuses_a_scalar():
    assert as_matrix(torch.ones(4)).shape == (4, 1)
    assert leading_triple(as_matrix(torch.ones(4))).sigma.item() == pytest.approx(2)
    with pytest.raises(ValueError, match=r"give it the shape \(1,\)"):
        as_matrix(torch.tensor(1.0))


@pytest.mark.parametrize(("num_parts", "dim"), [(3, 0), (4, 1)])
def test_what_cannot_be_cut_is_refused(num_parts, dim):
    with pytest.raises(ValueError, match=r"cannot split dimension .* of shape \(8, 6\) into"):
        matrices_of(torch.ones(8, 6), Parts((1,) * num_parts, dim=dim))

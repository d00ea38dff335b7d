"""The reference against AdamW of torch and exact singular values, and what is routed to it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, copy_weight, errors, make_weight, same, set_gradients, views
from torch.linalg import matrix_norm

from hf_stable.kernels import choosing, reference

MANY = dict(power_iterations=1000)
"""Iterations after which sigma is the largest singular value: of the cases, the second is at
most 0.991 of it, and 0.991 ** 4000 is the rounding of float64."""


def norm(matrix):
    """sigma1 of a matrix, of one that is stacked along its rows, or the l2 norm of a vector."""
    return matrix.norm() if matrix.ndim < 2 else matrix_norm(matrix.flatten(0, -2), 2)


@pytest.mark.parametrize("name", ["small", "vector", "scalar", "fused rows", "fused columns"])
@pytest.mark.parametrize("tau", [0.004, 1e9])
def test_a_step_is_algorithm_1_with_exact_norms(name, tau):
    generator = torch.Generator().manual_seed(0)
    weight = make_weight(CASES[name], torch.float64, generator, tau=tau, **MANY)
    set_gradients([weight], generator)
    group, start = weight.group, weight.param.clone()
    plain = torch.zeros_like(start)  # AdamW moves it by -U alone
    adam = torch.optim.AdamW([plain], 1.0, group["betas"], group["eps"], weight_decay=0.0)
    plain.grad = weight.grad
    adam.step()
    reference.step_weight(weight)
    rates = []
    for own, theirs, now in zip(
        views(weight, start), views(weight, plain), views(weight, weight.param), strict=True
    ):
        rates.append(min(group["lr"], tau * (norm(own) / norm(theirs)).item()))
        expected = own * (1 - rates[-1] * group["weight_decay"]) + rates[-1] * theirs
        # Rates are right to the rounding of sums of a hundred products; where the terms of an
        # entry cancel, what is left is right to their own rounding (they are below one).
        torch.testing.assert_close(now, expected, rtol=1e-13, atol=1e-15)
    assert weight.state["effective_lr"].tolist() == pytest.approx(rates, rel=1e-13)
    assert (min(rates) < group["lr"]) == (tau < 1)  # one case is clipped, the other is not
    state = adam.state[plain]
    torch.testing.assert_close(
        weight.state["exp_avg_sq"], state["exp_avg_sq"], rtol=1e-15, atol=0
    )  # the same products in another order


RELAID = {
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "half": lambda tensor: tensor.half(),
    "strided": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
}


@pytest.mark.parametrize("relay", RELAID.values(), ids=RELAID)
def test_a_layout_that_no_kernel_takes_goes_to_the_reference(relay, monkeypatch):
    """Beside a kernel alone: without one, the optimizer's own batches are faster."""
    pytest.importorskip("numba")
    monkeypatch.delenv(choosing.SWITCH, raising=False)
    weight = make_weight(CASES["small"], torch.float32, torch.Generator().manual_seed(0))
    set_gradients([weight], torch.Generator().manual_seed(1))
    usual = copy_weight(weight)
    weight.param, weight.grad = relay(weight.param), relay(weight.grad)
    for key in ("exp_avg", "exp_avg_sq"):
        weight.state[key] = relay(weight.state[key])
    assert choosing.step_by_kernels([weight, usual], choosing.Workspaces()) == []
    usual.param = usual.param.to(weight.param.dtype)
    # Weight, gradient and moments are rounded once each, the second moment twice: four half units
    # in the last place. The kernel sums in another order, over rows of 36 entries.
    tolerance = 2e-3 if weight.param.dtype == torch.float16 else 1e-5
    assert max(errors(weight, usual).values()) < tolerance
    before = copy_weight(weight)
    monkeypatch.setenv(choosing.SWITCH, "torch")
    assert choosing.step_by_kernels([weight], choosing.Workspaces()) == [weight]
    assert same(weight, before)

"""The Triton kernels against float64: on a GPU, or on CPU tensors by Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so `test_triton` runs these tests in a process of
their own.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from kernel_cases import (
    CASES,
    copy_weight,
    errors,
    make_weight,
    set_gradients,
    views,
)

from hf_stable.kernels import gpu, reference
from hf_stable.kernels.launches import MOST_COLUMNS
from hf_stable.kernels.layouts import lay_out
from hf_stable.measures.parts import Parts
from hf_stable.measures.power_iteration import power_step

TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 5e-2}
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
QUICK = ("vector", "fused rows")
SMALL = [
    name
    for name, (shape, _) in CASES.items()
    if DEVICE == "cuda" or torch.Size(shape).numel() < 30000  # the interpreter is slow
]


def make_weights(names, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    made = [make_weight(CASES[name], dtype, generator, **options) for name in names]
    return [copy_weight(weight, device=DEVICE) for weight in made]


def check_steps(names, dtype, steps=2, **options):
    weights = make_weights(names, dtype, **options)
    truths = [copy_weight(weight, torch.float64) for weight in weights]
    assert all(map(gpu.takes, weights))
    generator, workspace = torch.Generator().manual_seed(1), None
    for _ in range(steps):
        set_gradients(weights, generator)
        for weight, truth in zip(weights, truths, strict=True):
            truth.grad = weight.grad
            reference.step_weight(truth)
        workspace = gpu.step_weights(weights, workspace)
    for name, weight, truth in zip(names, weights, truths, strict=True):
        found = errors(weight, truth)
        assert max(found.values()) < TOLERANCES[dtype], (name, found)
    rates = torch.cat([weight.state["effective_lr"] for weight in weights])
    assert (rates < 0.9e-3).any() and (rates > 0).all()


def test_a_step_is_that_of_float64():
    check_steps(QUICK, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("options", [{}, dict(power_iterations=2, maximize=True)], ids=str)
def test_every_layout_is_stepped_right(dtype, options):
    check_steps(SMALL, dtype, **options)


def test_what_is_not_finite_spreads_but_spares_the_vectors():
    for bad in (math.nan, math.inf):
        weight = make_weights(["fused rows"])[0]
        set_gradients([weight], torch.Generator().manual_seed(5))
        weight.grad[0, 0] = bad
        before = weight.state["update_v"].clone()
        gpu.step_weights([weight])
        assert weight.param[0].isnan().any() and weight.param[32:].isfinite().all()
        assert torch.equal(weight.state["update_v"][0], before[0])
        assert not torch.equal(weight.state["update_v"][1], before[1])


def test_a_refresh_is_a_power_step_unless_the_step_was_skipped():
    weights = make_weights(["fused rows", "small"])
    params = [weight.param for weight in weights]
    layouts = [lay_out(weight.param.shape, weight.parts) for weight in weights]
    for keep in (None, torch.ones(1, device=DEVICE), torch.zeros((), device=DEVICE)):
        sigmas = [torch.zeros(len(layout.shapes), device=DEVICE) for layout in layouts]
        us = [torch.zeros(len(each.shapes), each.most_rows, device=DEVICE) for each in layouts]
        vs = [weight.state["weight_v"].clone() for weight in weights]
        gpu.refresh_vectors(params, layouts, sigmas, us, vs, keep=keep)
        if keep is not None and keep.item():
            assert not any(sigma.any() for sigma in sigmas) and not any(u.any() for u in us)
            assert all(
                torch.equal(v, w.state["weight_v"]) for v, w in zip(vs, weights, strict=True)
            )
            continue
        for index, weight in enumerate(weights):
            for place, matrix in enumerate(views(weight, weight.param)):
                expected = power_step([matrix], None, [weight.state["weight_v"][place]])[0]
                torch.testing.assert_close(sigmas[index][place], expected.sigma)
                torch.testing.assert_close(us[index][place], expected.u)
                torch.testing.assert_close(vs[index][place], expected.v)


def test_a_row_that_is_too_long_is_left_to_others():
    wide = ((2, MOST_COLUMNS + 1), Parts())
    weight = make_weight(wide, torch.float32, torch.Generator())
    assert not gpu.takes(copy_weight(weight, device=DEVICE))
    weight = make_weights(["small"])[0]
    assert gpu.takes(weight)
    weight.grad = weight.grad.t().contiguous().t()
    assert not gpu.takes(weight)

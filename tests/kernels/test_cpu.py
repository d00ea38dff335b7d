"""AdamW2's compiled step and sigma's compiled refresh against float64, on every layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kernel_cases import (
    CASES,
    copy_weight,
    errors,
    make_weight,
    random_case,
    same,
    set_gradients,
    views,
)
from torch import nn

from hf_stable.kernels import calls, cpu, reference, threads
from hf_stable.kernels.choosing import Workspaces, step_by_kernels
from hf_stable.kernels.layouts import lay_out
from hf_stable.measures.parts import Parts
from hf_stable.measures.power_iteration import power_step

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="needs numba")

TOLERANCES = {torch.float32: 3e-5, torch.float64: 1e-11, torch.bfloat16: 4e-2}
"""Of every tensor after six steps: what rounding does to entries, and so to crowded spectra."""

STEPS = 6


@pytest.fixture
def num_threads():
    """Set torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_weights(dtype=torch.float32, *, cases=None, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    cases = CASES.values() if cases is None else cases
    return [make_weight(case, dtype, generator, **options) for case in cases]


def run(weights, steps=STEPS, *, seed=1, keep_workspace=True, after=None):
    generator, workspace = torch.Generator().manual_seed(seed), None
    for step in range(steps):
        set_gradients(weights, generator)
        workspace = cpu.step_weights(weights, workspace if keep_workspace else None)
        if after is not None:
            after(step, weights)
    return weights


def run_plainly(weights, steps=STEPS, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        set_gradients(weights, generator)
        for weight in weights:
            reference.step_weight(weight)
    return weights


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("options", [{}, dict(power_iterations=3, maximize=True)], ids=str)
def test_a_step_is_that_of_float64(dtype, options, num_threads):
    num_threads(2)
    weights = make_weights(dtype, **options)
    assert all(map(cpu.takes, weights))
    truths = run_plainly([copy_weight(weight, torch.float64) for weight in weights])
    for (name, weight), truth in zip(zip(CASES, run(weights), strict=True), truths, strict=True):
        found = errors(weight, truth)
        assert max(found.values()) < TOLERANCES[dtype], (name, found)
    rates = torch.cat([weight.state["effective_lr"] for weight in weights])
    assert 0 < (rates < 0.9e-3).sum() and (rates > 0).all()
    start = make_weights(dtype, **options)
    assert all(not torch.equal(a.param, b.param) for a, b in zip(weights, start, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_any_list_of_weights_is_stepped_right(seed, num_threads):
    num_threads(1 + seed % 2)
    cases = [random_case(100 * seed + index) for index in range(12)]
    weights = make_weights(cases=cases, seed=seed, lr=1e-2)
    truths = run_plainly([copy_weight(weight, torch.float64) for weight in weights], steps=3)
    for case, weight, truth in zip(cases, run(weights, steps=3), truths, strict=True):
        found = errors(weight, truth)
        assert max(found.values()) < TOLERANCES[torch.float32], (case, found)


def test_groups_have_options_of_their_own():
    cases = [CASES["tall"], CASES["small"], CASES["vector"]]
    apart = [
        make_weights(cases=[case], seed=3, **options)[0]
        for case, options in zip(
            cases,
            (dict(lr=torch.tensor(1e-2), tau=0.1), dict(weight_decay=0.0, eps=1e-3), {}),
            strict=True,
        )
    ]
    apart[1].state["exempt"].fill_(True)
    truths = [copy_weight(weight, torch.float64) for weight in apart]
    truths[0].group = apart[0].group | {"lr": 1e-2}
    run_plainly(truths)
    for weight, truth in zip(run(apart), truths, strict=True):
        assert max(errors(weight, truth).values()) < 3e-5
    assert apart[1].state["effective_lr"].item() == pytest.approx(1e-3)


def test_threads_and_workspaces_change_no_bit(num_threads, monkeypatch):
    runs = []
    for count in (1, 2, 3):
        num_threads(count)
        runs += [run(make_weights()), run(make_weights(), keep_workspace=False)]
    num_threads(3)
    monkeypatch.setattr(calls, "run_on_threads", threads.by_threads_of_python)
    runs.append(run(make_weights()))
    for other in runs[1:]:
        assert all(map(same, other, runs[0]))
    assert not any(map(same, make_weights(), runs[0]))


def test_a_weight_that_changes_between_steps_is_iterated_on_anew():
    """In place, through `.data`, which leaves no trace, and by another vector in the state."""

    def change(step, weights):
        if step == 1:
            weights[0].param.mul_(2)
        if step == 2:
            weights[0].param.data.mul_(0.5)
        if step == 3:
            weights[0].state["weight_v"] = weights[0].state["weight_v"].flip(1).contiguous()

    cases = [CASES["large fused rows"]]
    kept = run(make_weights(cases=cases), after=change)
    fresh = run(make_weights(cases=cases), after=change, keep_workspace=False)
    assert all(map(same, kept, fresh))
    assert not any(map(same, kept, run(make_weights(cases=cases))))


def test_a_step_counts_as_a_change_of_the_weight():
    weights = make_weights(cases=[CASES["small"]])
    parameter = nn.Parameter(weights[0].param)
    weights[0].param = parameter
    product = (parameter * parameter).sum()
    run(weights, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["grad", "param"])
def test_what_is_not_finite_spreads_but_spares_the_vectors(bad, where):
    weights = run(make_weights(), 2)
    before = [copy_weight(weight) for weight in weights]
    set_gradients(weights, torch.Generator().manual_seed(5))
    for weight in weights:
        (weight.grad if where == "grad" else weight.param).view(-1)[0] = bad
    cpu.step_weights(weights)
    for (name, weight), old in zip(zip(CASES, weights, strict=True), before, strict=True):
        assert not weight.param.isfinite().all(), name
        # A norm of infinity clips nothing, so that infinity in a vector stays what it is.
        is_vector = lay_out(weight.param.shape, weight.parts).is_vector
        assert weight.param.isnan().any() or (is_vector and where == "param"), name
        for key in ("weight_v", "update_v"):
            assert weight.state[key].isfinite().all(), (name, key)
        first = "update_v" if where == "grad" else "weight_v"
        assert torch.equal(weight.state[first][0], old.state[first][0]), name
    # Parts without a bad entry go on.
    fused = weights[list(CASES).index("fused rows")]
    assert fused.param[32:].isfinite().all() and fused.state["effective_lr"][1:].isfinite().all()


def test_zero_matrices_get_a_vector_that_sees_what_comes():
    weights = make_weights()
    for weight in weights:
        weight.param.zero_()
        weight.state["exempt"].fill_(True)
    cpu.step_weights(weights)  # gradients of zero
    for name, weight in zip(CASES, weights, strict=True):
        rates = weight.state["effective_lr"]
        assert torch.equal(rates, torch.full_like(rates, 1e-3)), name
        assert not weight.param.any(), name
        lengths = weight.state["update_v"].norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), msg=name)
    truths = [copy_weight(weight, torch.float64) for weight in weights]
    run_plainly(truths, 2)
    for weight, truth in zip(run(weights, 2), truths, strict=True):
        assert errors(weight, truth)["param"] < 1e-4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w.state.pop("exempt"),
        lambda w: setattr(w, "param", w.param.half()),
        lambda w: setattr(w, "grad", w.grad.double()),
        lambda w: setattr(w, "grad", w.grad.t().contiguous().t()),
        lambda w: setattr(w, "grad", torch.zeros(()).expand_as(w.param)),
        lambda w: w.state.update(exp_avg=w.state["exp_avg"].t().contiguous().t()),
        lambda w: w.state.update(weight_v=w.state["weight_v"].double()),
        lambda w: w.state.update(effective_lr=w.state["effective_lr"].double()),
        lambda w: w.state.update(exempt=w.state["exempt"].float()),
        lambda w: setattr(w, "param", w.param.to_sparse()),
        lambda w: setattr(w, "param", w.param.to("meta")),
        lambda w: setattr(w, "parts", Parts((1, 1), 3, dim=1)),
    ],
)
def test_what_it_cannot_step_is_left_to_others(spoil):
    weight = make_weights(cases=[CASES["small"]])[0]
    assert cpu.takes(weight)
    spoil(weight)
    assert not cpu.takes(weight)


def moved(weight):
    weight.param.data = weight.param.data.clone()
    weight.state["exp_avg"].data = weight.state["exp_avg"].data.clone()


def replaced(weight):
    weight.state |= {key: value.clone() for key, value in weight.state.items()}
    weight.state["exp_avg"] *= 2


def turned(weight):
    weight.state["exp_avg"].data = weight.state["exp_avg"].t().contiguous().t()
    weight.grad = weight.grad.t().contiguous().t()


def widened(weight):
    weight.state["effective_lr"] = weight.state["effective_lr"].double()


def cut_otherwise(weight):
    rows = weight.state["weight_v"]
    weight.parts = Parts((1, 1))
    weight.state |= {key: rows.repeat(2, 1) for key in ("weight_v", "update_v")}
    weight.state |= {key: weight.state[key].repeat(2) for key in ("exempt", "effective_lr")}


@pytest.mark.parametrize("change", [moved, replaced, turned, widened, cut_otherwise])
def test_what_changes_between_steps_is_looked_at_again(change):
    """Against the same steps by kernels that have seen none of the weights before."""
    results = []
    for keeps in (True, False):
        weights = make_weights(cases=[CASES["small"], CASES["large fused rows"]])
        generator, workspaces = torch.Generator().manual_seed(1), Workspaces()
        for step in range(4):
            set_gradients(weights, generator)
            if step == 2:
                before = weights[0].param.clone()
                change(weights[0])
            assert step_by_kernels(weights, workspaces if keeps else Workspaces()) == []
        results.append(weights)
    assert all(map(same, *results))
    assert not torch.equal(before, weights[0].param)


# ---- sigma's refresh ----


def triples(weights, layouts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    real = torch.promote_types(weights[0].dtype, torch.float32)

    def vectors(sizes):
        rows = torch.zeros(len(sizes), max(sizes), dtype=real)
        for row, size in zip(rows, sizes, strict=True):
            row[:size] = nn.functional.normalize(torch.randn(size, generator=generator), dim=0)
        return rows

    return (
        [torch.zeros(len(layout.shapes), dtype=real) for layout in layouts],
        [vectors([rows for rows, _ in layout.shapes]) for layout in layouts],
        [vectors([columns for _, columns in layout.shapes]) for layout in layouts],
    )


def sigma_weights(dtype=torch.float32):
    weights = make_weights(dtype, cases=[c for c in CASES.values() if len(c[0]) > 1])
    layouts = [lay_out(weight.param.shape, weight.parts) for weight in weights]
    return weights, [weight.param for weight in weights], layouts


def check_refreshed(weights, refreshed, started, iterations, tolerance):
    for index, weight in enumerate(weights):
        sigmas, us, vs = (column[index] for column in refreshed)
        old_us, old_vs = (column[index] for column in started[1:])
        for place, view in enumerate(views(weight, weight.param)):
            matrix = view.flatten(0, -2)
            u, v = old_us[place, : len(matrix)], old_vs[place, : matrix.shape[1]]
            for _ in range(iterations):
                sigma, u, v = power_step([matrix], [u], [v])[0]
            torch.testing.assert_close(sigmas[place], sigma, rtol=tolerance, atol=0)
            for ours, theirs in ((us[place], u), (vs[place], v)):
                torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=tolerance)
                assert not ours[len(theirs) :].any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_refresh_is_a_power_step(dtype, iterations, num_threads):
    num_threads(2)
    weights, params, layouts = sigma_weights(dtype)
    started, refreshed = triples(params, layouts), triples(params, layouts)
    cpu.refresh_vectors(params, layouts, *refreshed, iterations=iterations)
    check_refreshed(weights, refreshed, started, iterations, 1e-11 if dtype.itemsize == 8 else 1e-5)
    assert not torch.equal(refreshed[2][0], started[2][0])


def test_a_refresh_keeps_vectors_of_what_is_zero_or_not_finite():
    weights, params, layouts = sigma_weights()
    params[0].zero_()
    params[1].view(-1)[3] = math.nan
    params[2].view(-1)[3] = math.inf
    started, refreshed = triples(params, layouts), triples(params, layouts)
    cpu.refresh_vectors(params, layouts, *refreshed)
    sigmas, us, vs = refreshed
    assert sigmas[0].item() == 0 and sigmas[1].isnan() and not sigmas[2].isfinite()
    for index in range(3):
        assert torch.equal(us[index], started[1][index])
        assert torch.equal(vs[index], started[2][index]) == (index > 0)
    torch.testing.assert_close(vs[0].norm(), torch.tensor(1.0))
    check_refreshed(weights[3:], [c[3:] for c in refreshed], [c[3:] for c in started], 1, 1e-5)


def test_a_refresh_gives_the_same_bits_on_any_number_of_threads(num_threads):
    _, params, layouts = sigma_weights()
    found = []
    for count in (1, 2, 4):
        num_threads(count)
        found.append(triples(params, layouts))
        cpu.refresh_vectors(params, layouts, *found[-1])
    for other in found[1:]:
        assert all(
            torch.equal(a, b)
            for x, y in zip(other, found[0], strict=True)
            for a, b in zip(x, y, strict=True)
        )


def test_bfloat16_rounds_as_torch_does():
    """Halfway cases, both ways, and what rounds up to infinity or is none."""
    values = torch.tensor(
        [1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.4e38, 1e-40, 0.0, -0.0]
    )
    weight = make_weights(torch.bfloat16, cases=[((len(values),), Parts())])[0]
    weight.group.update(lr=1.0, weight_decay=0.0, tau=1e30, betas=(0.0, 0.0))
    weight.param.zero_()
    weight.state["exempt"].fill_(True)
    # With betas of 0 the moments are the gradient and its square.
    gradient = values.to(torch.bfloat16)
    weight.grad = gradient
    cpu.step_weights([weight])
    assert torch.equal(weight.state["exp_avg"], gradient)
    expected = gradient.float().square().to(torch.bfloat16)
    assert torch.equal(weight.state["exp_avg_sq"], expected)
    assert np.isinf(expected.float().numpy()).any()

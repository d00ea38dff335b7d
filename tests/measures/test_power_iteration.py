"""One step of power iteration against its formula in float64: plain, fused and sharded weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from random_matrices import (
    SHAPES,
    exact_sigma,
    randn,
    unit,
    with_singular_values,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stable.measures import power_iteration
from hf_stable.measures.leading import leading_triple
from hf_stable.measures.matrices import (
    MatrixShard,
    matrices_of,
    spectral_dtype,
)
from hf_stable.measures.parts import WHOLE, Parts
from hf_stable.measures.power_iteration import STACK_MAX_NUMEL, power_step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_step_follows_the_formula(shape, dtype):
    matrix, u, v = randn(*shape, dtype=dtype), unit(shape[0], dtype=dtype), unit(shape[1], 1, dtype)
    ((sigma, new_u, new_v),) = power_step([matrix], [u], [v])
    wide = matrix.double()
    left = wide @ v.double()
    left /= left.norm()
    right = wide.T @ left
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(new_u.double(), left, rtol=0, atol=tolerance)
    torch.testing.assert_close(new_v.double(), right / right.norm(), rtol=0, atol=tolerance)
    assert sigma.item() == pytest.approx(right.norm().item(), rel=tolerance)
    assert sigma.item() == pytest.approx((new_u @ matrix @ new_v).item(), rel=10 * tolerance)


def test_warm_started_steps_converge_from_below():
    matrix = with_singular_values([1.0, 0.8, 0.5, 0.1], 30, 20)
    u, v = unit(30), unit(20) + 3 * torch.linalg.svd(matrix).Vh[1]
    v /= v.norm()
    sigmas = []
    for _ in range(60):
        ((sigma, u, v),) = power_step([matrix], [u], [v])
        sigmas.append(sigma.item())
    assert sigmas[0] < 0.9  # the start was far off
    assert all(later >= earlier - 1e-6 for earlier, later in zip(sigmas, sigmas[1:], strict=False))
    assert sigmas[-1] == pytest.approx(1, rel=1e-6)


def test_a_warm_start_tracks_a_moving_matrix_that_a_cold_start_loses():
    start, drift = randn(60, 40), randn(60, 40, seed=9)
    triple = leading_triple(start)
    for step in range(1, 11):
        moved = start + 0.002 * step * drift
        (triple,) = power_step([moved], [triple.u], [triple.v])
        ((cold, _, _),) = power_step([moved], [unit(60)], [unit(40)])
        exact = exact_sigma(moved)
        assert triple.sigma.item() == pytest.approx(exact, rel=1e-4)
        assert cold < 0.95 * exact


def test_results_are_new_tensors_and_inputs_stay():
    matrix, u, v = randn(9, 6), unit(9), unit(6)
    before = [t.clone() for t in (matrix, u, v)]
    (triple,) = power_step([matrix], [u], [v])
    assert all(torch.equal(a, b) for a, b in zip(before, (matrix, u, v), strict=True))
    assert not torch.equal(triple.v, v)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(9, 6), (300, 200)], ids=str)
def test_a_non_finite_matrix_reports_nan_and_keeps_its_vectors(shape, value):
    matrix, u, v = randn(*shape), unit(shape[0]), unit(shape[1])
    matrix[2, 3] = value
    other = randn(*shape, seed=5)  # of the same shape, in the same batch
    bad, good = power_step([matrix, other], [u, u], [v, v])
    assert bad.sigma.isnan() and torch.equal(bad.u, u) and torch.equal(bad.v, v)
    assert good.sigma.isfinite() and not torch.equal(good.v, v)


@pytest.mark.parametrize("shape", [(9, 6), (300, 200)], ids=str)
def test_a_zero_product_reports_zero_and_restarts(shape):
    u, v = unit(shape[0]), torch.zeros(shape[1])
    v[0] = 1
    matrix = randn(*shape)
    matrix[:, 0] = 0  # v is orthogonal to every row
    (stuck,) = power_step([matrix], [u], [v])
    assert stuck.sigma == 0 and torch.equal(stuck.u, u)
    assert stuck.v.norm().item() == pytest.approx(1) and not torch.equal(stuck.v, v)
    (moving,) = power_step([matrix], [stuck.u], [stuck.v])
    assert moving.sigma.item() == pytest.approx((moving.u @ matrix @ moving.v).item(), rel=1e-5)
    assert moving.sigma > (matrix @ stuck.v).norm()  # it has got on
    (again,) = power_step([matrix], [u], [v])
    assert again.sigma == 0  # with the old vector it would report 0 for ever


def test_bfloat16_weights_step_in_float32_under_autocast():
    matrix, u, v = randn(50, 30).bfloat16(), unit(50), unit(30)
    (plain,) = power_step([matrix.float()], [u], [v])
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = power_step([matrix], [u], [v])
        assert (matrix.float() @ v).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert inside.sigma.dtype == torch.float32


def test_mixed_shapes_and_dtypes_come_back_in_order():
    matrices = [
        randn(9, 6), randn(6, 9), randn(9, 6, seed=1).bfloat16(), randn(9, 6, dtype=torch.float64),
        randn(300, 200), randn(9, 6, seed=2),
    ]  # fmt: skip
    dtypes = [spectral_dtype(m.dtype) for m in matrices]
    us = [unit(m.shape[0], dtype=d) for m, d in zip(matrices, dtypes, strict=True)]
    vs = [unit(m.shape[1], dtype=d) for m, d in zip(matrices, dtypes, strict=True)]
    together = power_step(matrices, us, vs)
    for matrix, u, v, triple in zip(matrices, us, vs, together, strict=True):
        (alone,) = power_step([matrix], [u], [v])
        for mine, its in zip(triple, alone, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)


def test_no_matrix_is_no_work():
    assert power_step([], [], []) == []


def test_without_left_vectors_the_rest_is_the_same():
    matrix, u, v = randn(9, 6), unit(9), unit(6)
    (with_u,), (without,) = power_step([matrix], [u], [v]), power_step([matrix], None, [v])
    assert all(torch.equal(a, b) for a, b in zip(with_u, without, strict=True))


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_where_launches_count_their_number_does_not_grow_with_that_of_matrices(monkeypatch):
    matrices, v = [randn(256, 192, seed=i) for i in range(12)], [unit(192)] * 12
    one_by_one = power_step(matrices, None, v)

    def products(matrices):
        with _Calls() as calls:
            triples = power_step(matrices, None, v[: len(matrices)])
        return triples, [name for name in calls.names if name.split(".")[0] in ("mv", "bmm")]

    assert len(products(matrices)[1]) == 6 * len(products(matrices[:2])[1])
    monkeypatch.setattr(power_iteration, "STACK_MAX_NUMEL", math.inf)  # as on a GPU
    together, calls = products(matrices)
    assert len(calls) == len(products(matrices[:2])[1]) == 2
    for mine, its in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 256])
def test_shards_of_a_fused_weight_step_as_views(size):
    fused = randn(size, 3 * size)  # [Wq | Wk | Wv], the way Conv1D keeps them
    assert (size * size <= STACK_MAX_NUMEL) == (size == 8)  # both ways to batch are taken
    blocks = matrices_of(fused, Parts((1, 1, 1), dim=1))
    assert all(block.data_ptr() >= fused.data_ptr() for block in blocks)
    assert blocks[1].data_ptr() == fused[:, size:].data_ptr()
    us, vs = [unit(size)] * 3, [unit(size, 1)] * 3
    for triple, block in zip(power_step(blocks, us, vs), fused.chunk(3, dim=1), strict=True):
        (alone,) = power_step([block.contiguous()], us[:1], vs[:1])
        for mine, its in zip(triple, alone, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    fused[:, :size] *= 5  # a growing Wq moves its own sigma alone
    grown = power_step(blocks, us, vs)
    assert grown[0].sigma > 4 * grown[2].sigma


# Rows over several processes

SHARDED_CASES = [
    ((7, 5), WHOLE),  # uneven: 4 + 3 on two ranks, 3 + 3 + 1 on three
    ((2, 5), WHOLE),  # three ranks: one has no row
    ((1, 6), WHOLE),
    ((9, 5), Parts((1, 1, 1))),  # parts that do not end where shards do
    ((7, 6), Parts((1, 1, 1), dim=1)),
    ((6, 2, 2, 2), WHOLE),
    ((10, 5), Parts((3, 1, 1))),
    ((16, 5), Parts((2, 1, 1), repeats=2)),
    ((2, 8, 5), Parts((1, 1), stacked=True)),  # three ranks: one has no expert
]


def step_sharded():
    """On each rank: what `power_step` makes of the cases as DTensors, and of their local rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return [_step_sharded(mesh, dtype) for dtype in (torch.float32, torch.bfloat16)]


def _step_sharded(mesh, dtype):
    sharded, local, us, vs, rows = [], [], [], [], []
    for shape, parts in SHARDED_CASES:
        weight = randn(*shape).to(dtype)
        spread = matrices_of(distribute_tensor(weight, mesh, [Shard(0)]), parts)
        assert all(isinstance(block, MatrixShard) for block in spread)
        sharded += spread
        rows.append(len(spread[0].local))
        local += matrices_of(weight, parts)
    us = [unit(len(block)) for block in local]
    vs = [unit(block.shape[1], 1) for block in local]
    return {
        "sharded": [list(triple) for triple in power_step(sharded, us, vs)],
        "plain": [list(triple) for triple in power_step(local, us, vs)],
        "own rows": [list(t) for t in power_step([s.local for s in sharded], None, vs)],
        "rows": rows,
        "zero": [list(t) for t in _step_with_a_bad_weight(mesh, 0.0)],
        "nan": [list(t) for t in _step_with_a_bad_weight(mesh, math.nan)],
    }


def _step_with_a_bad_weight(mesh, value):
    weight = torch.zeros(7, 5)
    weight[6, 0] = value  # in the last rank's rows alone
    blocks = matrices_of(distribute_tensor(weight, mesh, [Shard(0)]))
    return power_step(blocks, [unit(7)], [unit(5, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_row_shards_step_like_the_whole_matrix(num_ranks):
    for ranks in zip(*run_ranks(step_sharded, num_ranks), strict=True):  # one dtype after another
        assert {0} < {rows for rank in ranks for rows in rank["rows"]}, "no rank was without rows"
        _assert_ranks_agree(ranks)


def _assert_ranks_agree(ranks):
    for rank in ranks:
        for mine, whole in zip(rank["sharded"], rank["plain"], strict=True):
            for ours, theirs in zip(mine, whole, strict=True):
                # The same sums in another order.
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        ours = [sigma for sigma, _, _ in rank["sharded"]]
        assert not all(
            torch.allclose(sigma, alone, rtol=1e-3)
            for sigma, (alone, _, _) in zip(ours, rank["own rows"], strict=True)
        ), "a rank's own rows would have been enough"
        for first, here in zip(ranks[0]["sharded"], rank["sharded"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, here, strict=True))
        ((sigma, u, v),) = rank["zero"]
        assert sigma == 0 and torch.equal(u, unit(7)) and not torch.equal(v, unit(5, 1))
        ((sigma, u, v),) = rank["nan"]
        assert sigma.isnan() and torch.equal(u, unit(7)) and torch.equal(v, unit(5, 1))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


LARGE_MATRICES = {
    "rows": lambda: torch.randn(256, 192),
    "columns": lambda: torch.randn(192, 256).T,
    "block of a fused matrix": lambda: torch.randn(256, 600)[:, 200:400],
    "block of rows, transposed": lambda: torch.randn(600, 256)[200:400].T,
    "prime lengths": lambda: torch.randn(257, 193),
    "no contiguous dimension": lambda: torch.randn(256, 400)[:, ::2],
}


@pytest.mark.parametrize("make", LARGE_MATRICES.values(), ids=LARGE_MATRICES)
def test_threads_share_a_product_and_give_the_same(make, two_threads):
    torch.manual_seed(0)
    matrix, v = make(), torch.randn(make().shape[1])
    assert matrix.numel() > STACK_MAX_NUMEL
    u = torch.zeros(len(matrix))
    (shared,) = power_step([matrix], [u], [v])
    torch.set_num_threads(1)
    (alone,) = power_step([matrix], [u], [v])
    torch.testing.assert_close(tuple(shared), tuple(alone), rtol=1e-5, atol=1e-6)
    wide = matrix.double()
    exact_u = torch.nn.functional.normalize(wide @ v.double(), dim=0)
    torch.testing.assert_close(shared.u.double(), exact_u, rtol=1e-5, atol=1e-6)
    image = wide.T @ exact_u
    torch.testing.assert_close(shared.sigma.double(), image.norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(shared.v.double(), image / image.norm(), rtol=1e-5, atol=1e-6)


def test_the_vector_that_restarts_a_zero_matrix_is_nobodys_to_change():
    zero, v = torch.zeros(300, 300), torch.ones(300)
    (first,) = power_step([zero], None, [v])
    first.v.mul_(0)
    (second,) = power_step([zero], None, [v])
    assert second.v.norm() == pytest.approx(1.0)

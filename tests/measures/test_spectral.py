"""Leading singular triples against an SVD in float64, on plain, fused and row-sharded weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stable.measures import spectral
from hf_stable.measures.spectral import (
    EXACT_SVD_MAX_DIM,
    STACK_MAX_NUMEL,
    RowShard,
    as_matrix,
    leading_triple,
    matrix_blocks,
    power_step,
    spectral_dtype,
    split_blocks,
)

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


# leading_triple


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


# power_step


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


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [(20, 20), (200, 150)], ids=["svd", "lanczos"])
def test_entries_whose_squares_leave_float32(size, shape):
    matrix = randn(*shape)
    usual, extreme = leading_triple(matrix), leading_triple(matrix * size)
    assert extreme.sigma.item() == pytest.approx(size * usual.sigma.item(), rel=1e-5)
    torch.testing.assert_close(extreme.v, usual.v, rtol=0, atol=1e-4)


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
    monkeypatch.setattr(spectral, "STACK_MAX_NUMEL", math.inf)  # as on a GPU
    together, calls = products(matrices)
    assert len(calls) == len(products(matrices[:2])[1]) == 2
    for mine, its in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 256])
def test_blocks_of_a_fused_weight_step_as_views(size):
    fused = randn(size, 3 * size)  # [Wq | Wk | Wv], the way Conv1D keeps them
    assert (size * size <= STACK_MAX_NUMEL) == (size == 8)  # both ways to batch are taken
    blocks = matrix_blocks(fused, 3, 1)
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


def test_a_kernel_is_flattened_and_a_transpose_swaps_the_vectors():
    kernel = randn(12, 3, 4, 4)
    (block,) = matrix_blocks(kernel)
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


@pytest.mark.parametrize(("num_blocks", "dim"), [(3, 0), (4, 1), (0, 0)])
def test_unequal_blocks_are_refused(num_blocks, dim):
    with pytest.raises(ValueError, match=r"cannot split dimension .* of a \(8, 6\) weight into"):
        split_blocks(torch.ones(8, 6), num_blocks, dim)


# Rows over several processes

SHARDED_CASES = [
    ((7, 5), 1, 0),  # uneven: 4 + 3 on two ranks, 3 + 3 + 1 on three
    ((2, 5), 1, 0),  # three ranks: one has no row
    ((1, 6), 1, 0),
    ((9, 5), 3, 0),  # blocks that do not end where shards do
    ((7, 6), 3, 1),
    ((6, 2, 2, 2), 1, 0),
]


def step_sharded():
    """On each rank: what `power_step` makes of the cases as DTensors, and of their local rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return [_step_sharded(mesh, dtype) for dtype in (torch.float32, torch.bfloat16)]


def _step_sharded(mesh, dtype):
    sharded, local, us, vs, rows = [], [], [], [], []
    for shape, num_blocks, dim in SHARDED_CASES:
        weight = randn(*shape).to(dtype)
        spread = matrix_blocks(distribute_tensor(weight, mesh, [Shard(0)]), num_blocks, dim)
        assert all(isinstance(block, RowShard) for block in spread)
        sharded += spread
        rows.append(len(spread[0].local))
        local += matrix_blocks(weight, num_blocks, dim)
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
    blocks = matrix_blocks(distribute_tensor(weight, mesh, [Shard(0)]))
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


def place_otherwise():
    """On each rank: a replicated weight's blocks, and the message for one sharded on columns."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = randn(6, 4)
    (replicated,) = matrix_blocks(distribute_tensor(weight, mesh, [Replicate()]))
    try:
        matrix_blocks(distribute_tensor(weight, mesh, [Shard(1)]))
    except ValueError as error:
        return {"replicated": replicated, "message": str(error)}


@pytest.mark.slow
def test_replicated_weights_are_plain_and_column_shards_are_refused():
    for rank in run_ranks(place_otherwise, 2):
        assert torch.equal(rank["replicated"], randn(6, 4))
        assert "allowed are replicated and sharded once, on dimension 0" in rank["message"]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


LARGE = {
    "rows": lambda: torch.randn(256, 192),
    "columns": lambda: torch.randn(192, 256).T,
    "block of a fused matrix": lambda: torch.randn(256, 600)[:, 200:400],
    "block of rows, transposed": lambda: torch.randn(600, 256)[200:400].T,
    "prime lengths": lambda: torch.randn(257, 193),
    "no contiguous dimension": lambda: torch.randn(256, 400)[:, ::2],
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
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

"""Matrices that processes share, however they are cut: the same spectra as of the whole weight."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from random_matrices import randn, unit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from hf_stable.measures.matrices import local_matrices, matrices_of, spread_values
from hf_stable.measures.matrix_shards import MatrixShard
from hf_stable.measures.parts import WHOLE, Parts
from hf_stable.measures.power_iteration import power_step

pytestmark = pytest.mark.slow

# What FSDP2 makes of what tensor parallelism has cut along the same dimension.
ROWS_TWICE = (_StridedShard(0, split_factor=2), Shard(0))
THIRDS = Parts((1, 1, 1))
CASES = {
    "column-wise": ((7, 5), WHOLE, (None, Shard(0))),
    "row-wise": ((7, 5), WHOLE, (None, Shard(1))),
    "replicated and sharded": ((7, 5), WHOLE, (Replicate(), Shard(0))),
    "rows twice": ((8, 5), WHOLE, ROWS_TWICE),
    "rows twice, uneven": ((9, 5), WHOLE, ROWS_TWICE),
    "rows and columns": ((7, 5), WHOLE, (Shard(0), Shard(1))),
    "columns twice": ((4, 9), WHOLE, (Shard(1), Shard(1))),
    "ranks with nothing": ((1, 3), WHOLE, (Shard(0), Shard(1))),
    "one column": ((6, 1), WHOLE, (Shard(0), Shard(1))),
    "a vector": ((5,), WHOLE, (None, Shard(0))),
    "a kernel's rows": ((5, 3, 2, 2), WHOLE, (None, Shard(0))),
    "a kernel's inputs": ((4, 3, 2, 2), WHOLE, (Shard(0), Shard(1))),
    "a kernel's height": ((4, 2, 3, 2), WHOLE, (None, Shard(2))),
    "thirds, row-wise": ((9, 5), THIRDS, (None, Shard(1))),
    "thirds, rows twice": ((9, 5), THIRDS, ROWS_TWICE),
    "thirds of columns, column-wise": ((5, 9), Parts((1, 1, 1), dim=1), (Shard(0), Shard(1))),
    "queries, keys, values": ((10, 5), Parts((3, 1, 1)), (None, Shard(0))),
    "interleaved": ((16, 5), Parts((2, 1, 1), repeats=2), (Shard(1), Shard(0))),
    "packed": ((12, 5), Parts((1, 1)), (None, _StridedShard(0, split_factor=2))),
    "packed, and sharded again": ((12, 5), Parts((1, 1)),
                                  (Shard(0), _StridedShard(0, split_factor=2))),
    "experts apart": ((3, 4, 5), Parts(stacked=True), (None, Shard(0))),
    "experts cut": ((3, 8, 5), Parts((1, 1), stacked=True), (None, Shard(1))),
    "experts apart and cut": ((3, 8, 5), Parts((1, 1), stacked=True), (Shard(0), Shard(2))),
    "packed experts": ((3, 8, 5), Parts((1, 1), stacked=True),
                       (Shard(0), _StridedShard(1, split_factor=2))),
}  # fmt: skip


def step_all():
    """On each rank: what `power_step` makes of all cases at once, and what it held of them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found, shards, us, vs = {}, [], [], []
    for name, (shape, parts, placements) in CASES.items():
        weight = randn(*shape)
        where = mesh["tp"] if placements[0] is None else mesh
        own = [each for each in placements if each is not None]
        spread = distribute_tensor(weight, where, own, src_data_rank=None)
        wholes, mine = local_matrices(weight, parts), matrices_of(spread, parts)
        assert all(isinstance(shard, MatrixShard) for shard in mine), name
        values = torch.arange(1.0, 1.0 + len(wholes))
        scaled = weight * parts.spread(values, shape)
        here = spread.to_local() * spread_values(values, spread, parts)
        found[name] = {
            "count": len(wholes),
            "numel": sum(shard.local.numel() for shard in mine),
            "scaled": torch.equal(
                here, distribute_tensor(scaled, where, own, src_data_rank=None).to_local()
            ),
        }
        shards += mine
        us += [unit(matrix.shape[0]) for matrix in wholes]
        vs += [unit(matrix.shape[1], 1) for matrix in wholes]
    calls, reduce = 0, dist.all_reduce

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    dist.all_reduce = counting
    triples = power_step(shards, us, vs)
    dist.all_reduce = reduce
    for each in found.values():
        own, triples = triples[: each["count"]], triples[each["count"] :]
        each["triples"] = [list(triple) for triple in own]
    return {"cases": found, "calls": calls}


def test_every_way_to_cut_a_weight_gives_the_spectra_of_the_whole():
    ranks = run_ranks(step_all, 4)
    # Three sets of processes: one dimension of the mesh, the other, both. y and z of the matrices
    # of each go together, over each of its dimensions.
    assert {rank["calls"] for rank in ranks} == {2 * 1 + 2 * 2}
    for name, (shape, parts, _) in CASES.items():
        weight = randn(*shape)
        wholes = local_matrices(weight, parts)
        us = [unit(matrix.shape[0]) for matrix in wholes]
        vs = [unit(matrix.shape[1], 1) for matrix in wholes]
        expected = [list(triple) for triple in power_step(wholes, us, vs)]
        cases = [rank["cases"][name] for rank in ranks]
        assert any(case["numel"] < weight.numel() for case in cases), name
        for case in cases:
            # The same sums in another order.
            torch.testing.assert_close(case["triples"], expected, rtol=1e-5, atol=1e-6, msg=name)
            assert case["scaled"], name
            for mine, first in zip(case["triples"], cases[0]["triples"], strict=True):
                assert all(map(torch.equal, mine, first)), f"ranks differ: {name}"


def place_otherwise():
    """On each rank: a replicated weight's matrices, and the message for one still to be summed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = randn(6, 4)
    (replicated,) = matrices_of(distribute_tensor(weight, mesh, [Replicate()]))
    one_by_two = init_device_mesh("cpu", (1, dist.get_world_size()))
    (alone,) = matrices_of(distribute_tensor(weight, one_by_two, [Shard(1), Replicate()]))
    try:
        matrices_of(DTensor.from_local(weight, mesh, [Partial()]))
    except ValueError as error:
        return {"replicated": replicated, "alone": alone, "message": str(error)}


def test_replicated_weights_are_plain_and_sums_to_come_are_refused():
    for rank in run_ranks(place_otherwise, 2):
        assert torch.equal(rank["replicated"], randn(6, 4))
        assert torch.equal(rank["alone"], randn(6, 4)), "a mesh of one cuts nothing"
        assert "still to be summed over processes" in rank["message"]

"""Sharded and whole tensors, values by rank: alone, and in two processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from gloo_ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_stable import _ranks

WEIGHT = torch.arange(15.0).view(5, 3)


def test_one_process_gets_back_what_it_gives():
    assert _ranks.num_ranks() == 1
    assert _ranks.whole_tensor(WEIGHT) is WEIGHT and _ranks.local_tensor(WEIGHT) is WEIGHT
    assert _ranks.whole_tensor("no tensor") == "no tensor"
    assert _ranks.value_of_first_rank({"a": 1}) == {"a": 1}
    assert _ranks.values_of_all_ranks("mine") == ["mine"]
    assert _ranks.mean_over_ranks(torch.tensor(2.0), torch.tensor([3])) == [2.0, 3.0]


def test_accelerates_wrapper_is_taken_off_and_others_stay():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert wrapped is not optimizer
    assert _ranks.inner_optimizer(wrapped) is optimizer is _ranks.inner_optimizer(optimizer)


def in_two_processes():
    mesh = init_device_mesh("cpu", (2,))
    rank, shard = dist.get_rank(), distribute_tensor(WEIGHT, mesh, [Shard(0)])
    return {
        "num": _ranks.num_ranks(),
        "whole": _ranks.whole_tensor(shard),
        "local": _ranks.local_tensor(shard),
        "first": _ranks.value_of_first_rank(f"of rank {rank}"),
        "all": _ranks.values_of_all_ranks(rank * 10),
        "mean": _ranks.mean_over_ranks(torch.tensor(float(rank)), torch.tensor(4.0)),
    }


@pytest.mark.slow
def test_two_processes_share_values_and_parts_of_a_tensor():
    first, second = run_ranks(in_two_processes, 2)
    for rank in (first, second):
        assert rank["num"] == 2
        assert torch.equal(rank["whole"], WEIGHT)
        assert rank["first"] == "of rank 0" and rank["all"] == [0, 10]
        assert rank["mean"] == [0.5, 4.0]
    assert torch.equal(torch.cat([first["local"], second["local"]]), WEIGHT)
    assert len(first["local"]) == 3 and len(second["local"]) == 2

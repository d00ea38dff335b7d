"""Ranks that share a model through FSDP2, without the Trainer, and have patched it differently."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from faults import check_told, told_where_memory_ends
from gloo_ranks import run_ranks
from tiny_models import tiny_batch, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hf_stable
from hf_stable.methods.agreement import refuse_different_shards
from hf_stable.methods.sigma_reparam.method import sigma_layers

pytestmark = pytest.mark.slow

METHODS = {
    "the same": [("sigma_reparam", {}), ("sigma_reparam", {})],
    "plain": [None, None],
    "another layer": [("sigma_reparam", {}), ("sigma_reparam", {"exclude": ["*.h.1.*"]})],
    "other iterations": [("sigma_reparam", {"power_iterations": 2}), ("sigma_reparam", {})],
    "one plain": [("sigma_reparam", {}), None],
    "one without norms": [None, ("remove_pre_layernorm", {})],
}


def first_forward(method, roots):
    """What a rank is told by its first forward, or how large the loss was."""
    model = tiny_model("gpt2")
    if method is not None:
        hf_stable.patch(model, method[0], **method[1])
    dist.barrier()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    if roots == "model":
        fully_shard(model, mesh=mesh)
    try:
        return model(**tiny_batch(model)).loss.item()
    except ValueError as error:
        return str(error)


def on_ranks():
    rank = dist.get_rank()
    told = {"early": early(rank)}
    for case, methods in METHODS.items():
        told[case] = first_forward(methods[rank], "model")
    told["blocks"] = first_forward(METHODS["another layer"][rank], "blocks")
    if rank == 0:  # a model of its own, which it shares with nobody
        hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    told["of its own"] = first_forward(None, "model")
    return told


FAULTS = {
    "hf_stable.methods.sigma_reparam.triples.sigma_of": 2,
    "hf_stable.methods.sigma_reparam.folding._local_effective_weight": 2,
}


def fold_on_ranks():
    """What each rank is told by a fold that fails on the first alone, and what is left."""
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam", init="one")
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    before = {name: tensor.full_tensor() for name, tensor in model.named_parameters()}
    told = {
        path: told_where_memory_ends(path, at, 0, lambda: hf_stable.fold(model))
        for path, at in FAULTS.items()
    }
    after = {name: tensor.full_tensor() for name, tensor in model.named_parameters()}
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    hf_stable.fold(model)
    return {"told": told, "same": same, "patched": hf_stable.is_patched(model)}


def early(rank):
    """One rank comes to its first forward before the other has begun to patch."""
    model = tiny_model("gpt2")
    said = ""
    if rank:
        refuse_different_shards(model, [0, 1])
    dist.barrier()
    if not rank:
        hf_stable.patch(model, "sigma_reparam")
        try:
            refuse_different_shards(model, [1, 0])
        except ValueError as error:
            said = str(error)
    dist.barrier()
    return said


def test_ranks_that_patched_differently_are_told_before_the_first_forward():
    told = run_ranks(on_ranks, 2)
    number = len(sigma_layers(hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")))
    for rank, said in enumerate(told):
        for case in ("another layer", "other iterations", "one plain", "one without norms"):
            assert "the ranks have patched the model differently" in said[case], case
            assert f"and rank {1 - rank}, with" in said[case]
        assert "transformer.h.1." in said["another layer"]
        assert f"with {number} patched layers" in said["one plain"] or rank
        assert "ln_1: removed" in said["one without norms"]
    # Blocks that are shards of their own are compared one by one: the second one differs.
    assert ["with 4 patched layers, and rank 1, with 0" in said["blocks"] for said in told] == [
        True, False,
    ]  # fmt: skip
    assert "with 0 patched layers, and rank 0, with 4" in told[1]["blocks"]
    assert f"with {number} patched layers, and rank 1, with 0" in told[0]["early"]
    plain = tiny_model("gpt2")
    with torch.no_grad():
        expected = plain(**tiny_batch(plain)).loss.item()
    for said in told:
        for case in ("the same", "plain", "of its own"):
            assert said[case] == pytest.approx(expected, rel=1e-6), case  # float32 rounds


def test_a_fold_that_fails_on_one_rank_fails_on_all_and_changes_nothing():
    found = run_ranks(fold_on_ranks, 2)
    for path in FAULTS:
        check_told([each["told"][path] for each in found], path, 0)
    assert [(each["same"], each["patched"]) for each in found] == [(True, False)] * 2

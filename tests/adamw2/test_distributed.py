"""AdamW2 over real processes, gloo on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.measures.parts import Parts

pytestmark = pytest.mark.slow

STEPS = 6
MODEL = "a net with a fused layer and a kernel"
OPTIONS = dict(lr=2e-2, tau=0.004, weight_decay=0.1)


class Net(nn.Module):
    """Odd sizes, so that shards are uneven; `head` has one row: most ranks hold none of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fused = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.kernel = nn.Conv2d(1, 5, 3)
        self.head = nn.Linear(5, 1)

    def forward(self, x):
        x = self.norm(self.fused(x))
        return self.head(torch.tanh(self.kernel(x.view(-1, 1, 3, 3)).flatten(1)))


def make_groups(model):
    """Two groups: the fused weight in three blocks of rows, and the rest."""
    fused = [model.fused.weight]
    rest = [param for param in model.parameters() if param is not model.fused.weight]
    return [dict(params=fused, parts=Parts((1, 1, 1))), dict(params=rest)]


def batch(step, rank=0, world=1):
    """The rank's share of the 12 examples of a step."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 6, generator=generator), torch.randn(12, 1, generator=generator)
    return x[rank::world], y[rank::world]


def run_steps(model, optimizer, steps, rank=0, world=1):
    losses = []
    for step in steps:
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def report(model, optimizer, losses, folder, name):
    """Save what every rank must agree on; rank 0's copy is what the test reads."""
    rates = [
        optimizer.state[param]["effective_lr"].tolist()
        for group in optimizer.param_groups
        for param in group["params"]
    ]
    weights = [whole(param) for param in model.parameters()]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (rates, weights))
    for other_rates, other_weights in gathered:
        assert other_rates == rates, "ranks clipped differently"
        assert all(map(torch.equal, other_weights, weights)), "ranks drifted apart"
    if dist.get_rank() == 0:
        torch.save((losses, weights, rates), folder / f"{name}.pt")
    dist.barrier()


def shard(model):
    fully_shard(model.kernel)
    fully_shard(model)
    rows = [param.to_local().shape[0] for param in model.parameters()]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    assert any(0 in held for held in gathered), "no rank is without rows"
    assert len(set(map(tuple, gathered))) > 1, "shards are even"
    return model


def lay_out(model, way):
    """Cut a model over all processes; return it with the place and number of its replicas."""
    world = dist.get_world_size()
    sizes = (1, world) if way == "tensor parallel" else (2, world // 2)
    names = ("replicate", "shard") if way == "HSDP" else ("dp", "tp")
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    if way == "HSDP":
        return fully_shard(model, mesh=mesh), dist.get_rank(), world
    plan = {
        "fused": ColwiseParallel(output_layouts=Replicate()),
        "head": RowwiseParallel(input_layouts=Replicate()),
    }
    model = parallelize_module(model, mesh["tp"], plan)
    if way == "FSDP2 x TP":
        model = fully_shard(model, mesh=mesh["dp"])
    return model, mesh.get_local_rank("dp"), sizes[0]


def worker_laid_out(folder, way):
    """Train, save halfway, and go on."""
    model, rank, world = lay_out(Net(), way)
    optimizer = AdamW2(make_groups(model), **OPTIONS)
    losses = run_steps(model, optimizer, range(STEPS // 2), rank, world)
    weights, state = get_state_dict(model, optimizer)
    dcp.save(dict(model=weights, optimizer=state), checkpoint_id=folder / "dcp")
    losses += run_steps(model, optimizer, range(STEPS // 2, STEPS), rank, world)
    report(model, optimizer, losses, folder, way)


def worker_ddp(folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(Net())
    optimizer = AdamW2(make_groups(model.module), **OPTIONS)
    losses = run_steps(model, optimizer, range(STEPS), rank, world)
    report(model.module, optimizer, losses, folder, "ddp")


def worker_fsdp2(folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = shard(Net())
    optimizer = AdamW2(make_groups(model), **OPTIONS)
    calls = 0
    reduce = dist.all_reduce

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    losses = run_steps(model, optimizer, range(STEPS - 1), rank, world)
    dist.all_reduce = counting
    x, y = batch(STEPS - 1, rank, world)
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    dist.all_reduce = reduce
    # One power iteration for all weights and updates, one more for all updates.
    assert calls == 2, calls
    loss = loss.detach()
    dist.all_reduce(loss)
    report(model, optimizer, [*losses, loss.item() / world], folder, "fsdp2")


def worker_zero(folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(Net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamW2, **OPTIONS)
    losses = run_steps(model, optimizer, range(STEPS), rank, world)
    weights = [whole(param) for param in model.parameters()]
    gathered = [None] * world
    dist.all_gather_object(gathered, weights)
    assert all(all(map(torch.equal, other, weights)) for other in gathered)
    if rank == 0:
        torch.save((losses, weights, None), folder / "zero.pt")
    dist.barrier()


def worker_zero_again(folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(Net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamW2, **OPTIONS)
    losses = run_steps(model, optimizer, range(STEPS // 2), rank, world)
    optimizer.consolidate_state_dict(0)
    state = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(state, 0)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamW2, lr=1.0)
    optimizer.load_state_dict(state[0])
    for entry in optimizer.optim.state.values():
        assert entry["weight_v"].dtype == torch.float32 and entry["exempt"].dtype == torch.bool
    losses += run_steps(model, optimizer, range(STEPS // 2, STEPS), rank, world)
    if rank == 0:
        weights = [whole(param) for param in model.parameters()]
        torch.save((losses, weights, None), folder / "zero_again.pt")
    dist.barrier()


def worker_nan(folder):
    """A gradient that is NaN on one rank alone: all ranks keep the same finite vectors."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = shard(Net())
    optimizer = AdamW2(make_groups(model), **OPTIONS)
    run_steps(model, optimizer, range(2), rank, world)
    kept = [state["weight_v"].clone() for state in optimizer.state.values()]
    x, y = batch(2, rank, world)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    if rank == 0:
        for param in model.parameters():
            param.grad.to_local().fill_(float("nan"))
    optimizer.step()
    assert whole(model.fused.weight).isnan().any()
    for state in optimizer.state.values():
        assert state["weight_v"].isfinite().all() and state["update_v"].isfinite().all()
    run_steps(model, optimizer, range(3, 4), rank, world)  # what is NaN now keeps its vectors
    vectors = [state["weight_v"] for state in optimizer.state.values()]
    assert all(vector.isfinite().all() for vector in vectors)
    assert any(not torch.equal(a, b) for a, b in zip(vectors, kept, strict=True))
    gathered = [None] * world
    dist.all_gather_object(gathered, vectors)
    assert all(all(map(torch.equal, other, vectors)) for other in gathered)


def worker_save(folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = shard(Net())
    optimizer = AdamW2(make_groups(model), **OPTIONS)
    run_steps(model, optimizer, range(STEPS // 2), rank, world)
    weights, state = get_state_dict(model, optimizer)
    dcp.save(dict(model=weights, optimizer=state), checkpoint_id=folder / "dcp")


def worker_load(folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Net()
    with torch.no_grad():  # weights that are not the saved ones
        for param in model.parameters():
            param.add_(1)
    model = shard(model) if world > 1 else fully_shard(model)
    optimizer = AdamW2(make_groups(model), **OPTIONS)
    weights, state = get_state_dict(model, optimizer)
    dcp.load(dict(model=weights, optimizer=state), checkpoint_id=folder / "dcp")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for param in model.parameters():
        assert optimizer.state[param]["weight_v"].dtype == torch.float32
    losses = run_steps(model, optimizer, range(STEPS // 2, STEPS), rank, world)
    report(model, optimizer, losses, folder, f"load{world}")


def run_alone(*, blocks=True):
    model = Net()
    groups = make_groups(model) if blocks else model.parameters()
    optimizer = AdamW2(groups, **OPTIONS)
    losses = run_steps(model, optimizer, range(STEPS))
    rates = [
        optimizer.state[param]["effective_lr"].tolist()
        for group in optimizer.param_groups
        for param in group["params"]
    ]
    return losses, [whole(param) for param in model.parameters()], rates


def check(saved, expected, *, first=0):
    losses, weights, rates = saved
    expected_losses, expected_weights, expected_rates = expected
    # float32 sums in another order, through six steps of a model of weights below 1.
    torch.testing.assert_close(losses, expected_losses[first:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-4)
    if rates is not None:
        torch.testing.assert_close(rates, expected_rates, rtol=1e-2, atol=0)
    start = [whole(param) for param in Net().parameters()]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(weights, start, strict=True))


WORKERS = {"DDP": "ddp", "FSDP2": "fsdp2", "ZeroRedundancyOptimizer": "zero"}


@pytest.mark.parity(engine="{engine}", models=(MODEL,), method="AdamW2", same=("losses",))
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("engine", WORKERS)
def test_many_processes_train_as_one(engine, world, tmp_path):
    way = WORKERS[engine]
    run_ranks(globals()[f"worker_{way}"], world, tmp_path)
    saved = torch.load(tmp_path / f"{way}.pt", weights_only=True)
    expected = run_alone(blocks=way != "zero")
    check(saved, expected)
    assert min(min(rates) for rates in expected[2]) < 0.5 * OPTIONS["lr"]  # the rule did bind


@pytest.mark.parity(
    engine="{way}", models=(MODEL,), method="AdamW2", same=("losses", "vectors", "resume")
)
@pytest.mark.parametrize("path", ["kernels"], indirect=True)  # none takes a shard
@pytest.mark.parametrize("way", ["HSDP", "tensor parallel", "FSDP2 x TP"])
def test_meshes_train_as_one_and_what_they_save_continues_on_one(way, tmp_path):
    run_ranks(worker_laid_out, 2 if way == "tensor parallel" else 4, tmp_path, way)
    expected = run_alone()
    check(torch.load(tmp_path / f"{way}.pt", weights_only=True), expected)
    run_ranks(worker_load, 1, tmp_path)
    check(torch.load(tmp_path / "load1.pt", weights_only=True), expected, first=STEPS // 2)


@pytest.mark.parity(
    engine="ZeroRedundancyOptimizer", models=(MODEL,), method="AdamW2", same=("resume",)
)
def test_a_consolidated_state_of_zero_redundancy_continues(tmp_path):
    run_ranks(worker_zero_again, 2, tmp_path)
    check(torch.load(tmp_path / "zero_again.pt", weights_only=True), run_alone(blocks=False))


def test_a_gradient_that_is_not_finite_spares_the_vectors_of_all_ranks(tmp_path):
    run_ranks(worker_nan, 2, tmp_path)


@pytest.mark.parity(engine="FSDP2", models=(MODEL,), method="AdamW2", same=("resume",))
def test_a_state_saved_on_two_processes_continues_on_one_and_on_three(tmp_path):
    run_ranks(worker_save, 2, tmp_path)
    expected = run_alone()
    for world in (1, 3):
        run_ranks(worker_load, world, tmp_path)
        saved = torch.load(tmp_path / f"load{world}.pt", weights_only=True)
        check(saved, expected, first=STEPS // 2)

"""On a CUDA device: the same numbers as on the CPU, no waiting for the host, bounded memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_models import tiny_batch, tiny_model
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hf_stable
from hf_stable.adamw2.model_optimizer import ModelAdamW2
from hf_stable.commands.bench.adamw2 import bench_adamw2
from hf_stable.commands.bench.sigma import SigmaBenchSizes, bench_sigma
from hf_stable.commands.bench.timing import TOTAL
from hf_stable.kernels.choosing import SWITCH
from hf_stable.measures.entropy import attention_entropy_from_qk

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes import data  # noqa: E402
from recipes.models import build  # noqa: E402
from recipes.results import generalisation  # noqa: E402
from recipes.settings import Settings  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 10


@pytest.fixture(autouse=True)
def exact_products():
    """Keep TF32 out of comparisons with the CPU."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(params=["", "triton"])
def kernels(request, monkeypatch):
    """Each way in which a GPU's weights can be stepped and refreshed."""
    monkeypatch.setenv(SWITCH, request.param)


def patched_run(model_type, device, *, autocast=False):
    """Losses of some steps of a patched model under AdamW2, and the model."""
    torch.manual_seed(0)
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam").to(device).train()
    optimizer = ModelAdamW2(
        [{"params": list(model.parameters())}], structure=model, lr=1e-2, tau=1e-2
    )
    batch = {name: tensor.to(device) for name, tensor in tiny_batch(model).items()}
    losses = []
    for _ in range(STEPS):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def test_losses_are_those_of_the_cpu(model_type, kernels):
    on_gpu, model = patched_run(model_type, "cuda")
    on_cpu, twin = patched_run(model_type, "cpu")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    assert max(on_cpu) - min(on_cpu) > 1e-2
    for (name, ours), theirs in zip(
        hf_stable.fold(model).state_dict().items(),
        hf_stable.fold(twin).state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-3, msg=name)


def test_vectors_stay_float32_under_autocast(model_type, kernels):
    losses, model = patched_run(model_type, "cuda", autocast=True)
    assert losses[-1] < losses[0]
    buffers = [b for name, b in model.named_buffers() if "sigma" in name]
    assert buffers and all(b.dtype == torch.float32 for b in buffers)


def test_a_step_never_waits_for_the_device(model_type, kernels):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam").to("cuda")
    optimizer = ModelAdamW2([{"params": list(model.parameters())}], structure=model, lr=1e-2)
    batch = {name: tensor.to("cuda") for name, tensor in tiny_batch(model).items()}
    for step in range(3):  # the first creates the state
        model(**batch).loss.backward()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()  # and the refresh behind it
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_probe_records_what_the_cpu_records(model_type):
    def entropies(device):
        torch.manual_seed(0)
        model = tiny_model(model_type).to(device).eval()
        batch = {name: tensor.to(device) for name, tensor in tiny_batch(model).items()}
        with hf_stable.probe(model) as records:
            model(**batch)
        return records.entropy

    on_gpu, on_cpu = entropies("cuda"), entropies("cpu")
    assert list(on_gpu) == list(on_cpu)
    for layer, values in on_gpu.items():
        torch.testing.assert_close(values.cpu(), on_cpu[layer], rtol=1e-4, atol=1e-4)


def test_entropy_keeps_no_map_of_all_pairs():
    tokens, heads = 4096, 8
    q, k = torch.randn(2, 1, heads, tokens, 64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    entropy = attention_entropy_from_qk(q, k, is_causal=True)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 4 * heads * tokens * tokens / 4
    probabilities = F.softmax(
        (q @ k.mT / 8).masked_fill(
            torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").triu(1), float("-inf")
        ),
        -1,
    )
    torch.testing.assert_close(
        entropy, torch.special.entr(probabilities).sum(-1), rtol=1e-3, atol=1e-3
    )


def test_a_step_needs_little_more_memory_than_one_weight():
    weights = [torch.nn.Parameter(torch.randn(1024, 1024, device="cuda")) for _ in range(16)]
    shapes = [torch.nn.Parameter(torch.randn(512 + 8 * i, 512, device="cuda")) for i in range(16)]
    optimizer = hf_stable.AdamW2([*weights, *shapes], lr=1e-3, tau=1e-2)
    for _ in range(2):
        for param in (*weights, *shapes):
            param.grad = torch.randn_like(param)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
    # Weights of one shape go together on a GPU: sixteen of the largest, twice for the products.
    assert torch.cuda.max_memory_allocated() - before < 2.5 * 16 * weights[0].numel() * 4


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor on the CPU"])
@pytest.mark.parametrize("tau", [0.01, float("inf")])
def test_a_step_can_be_captured(lr, tau):
    def run(captured):
        torch.manual_seed(0)
        shapes = (64, 32), (64, 32), (48, 64), (64,)
        weights = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
        optimizer = hf_stable.AdamW2(weights, lr=lr, tau=tau, capturable=True)
        grads = [[torch.randn_like(weight) for weight in weights] for _ in range(STEPS)]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        graph = torch.cuda.CUDAGraph()
        for step, new in enumerate(grads):
            for weight, grad in zip(weights, new, strict=True):
                weight.grad.copy_(grad)
            if captured and step == 3:  # the first steps create the state
                with torch.cuda.graph(graph):
                    optimizer.step()
            if captured and step >= 3:
                graph.replay()
            else:
                optimizer.step()
        return [weight.detach() for weight in weights]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ratios_stay_within_generous_limits():
    """On a shared GPU an honest limit would fail at times: these say what is out of order."""
    sizes = SigmaBenchSizes(hidden=768, layers=12, heads=12)
    rows = bench_sigma(rounds=10, sizes=sizes, device="cuda", only="vit step, batch 16")
    sigma = {row.subject: row.ratio for row in rows if row.phase == TOTAL}
    assert 0.8 < sigma["sigma_reparam"] < 2
    rows = bench_adamw2(rounds=10, device="cuda", only="step alone")
    for case in {row.case for row in rows}:
        taken = {row.subject: row.ratio for row in rows if (row.case, row.phase) == (case, TOTAL)}
        assert taken["AdamW2"] < 30, case
        # A power iteration matrix by matrix, with a wait for each, is what AdamW2 avoids.
        assert "naive loop" not in taken or taken["AdamW2"] < taken["naive loop"], case


def sharded_run(wrapper):
    """`patched_run` of a GPT-2 on the only rank of a process group, wrapped."""
    torch.manual_seed(0)
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam").to("cuda").train()
    trained = model
    if wrapper == "ddp":
        trained = DistributedDataParallel(model)
    else:
        policy = CPUOffloadPolicy() if wrapper == "fsdp2, offloaded" else OffloadPolicy()
        for block in model.transformer.h:
            fully_shard(block, offload_policy=policy)
        fully_shard(model, offload_policy=policy)
        weight = model.transformer.h[0].mlp.c_fc.weight
        assert isinstance(weight, DTensor)
        assert weight.device.type == ("cpu" if wrapper == "fsdp2, offloaded" else "cuda")
    optimizer = ModelAdamW2(
        [{"params": list(model.parameters())}], structure=model, lr=1e-2, tau=1e-2
    )
    batch = {name: tensor.to("cuda") for name, tensor in tiny_batch(model).items()}
    losses = []
    for _ in range(STEPS):
        loss = trained(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2, offloaded"])
def test_a_rank_of_nccl_trains_as_a_process_alone(wrapper, tmp_path):
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        losses, model = sharded_run(wrapper)
        assert not hf_stable.is_patched(hf_stable.fold(model))
    finally:
        dist.destroy_process_group()
    assert losses == pytest.approx(patched_run("gpt2", "cuda")[0], rel=1e-3)


def test_generalisation_of_a_recipe_is_measured_where_the_model_is():
    model, task = build(Settings(), data.digits()), data.digits()
    on_cpu = generalisation(model, task)
    on_gpu = generalisation(model.to("cuda"), task)
    assert on_gpu == pytest.approx(on_cpu, abs=0.01) and 0 < on_cpu["noisy_accuracy"] < 1

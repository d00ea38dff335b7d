"""The cost model: its counts are those of real models and real processes."""

import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from gloo_ranks import run_ranks
from tiny_architectures import build
from tiny_models import tiny_batch, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.distributed import DistributedConfig

import hf_stable
from hf_stable.adamw2.model_optimizer import ModelAdamW2
from hf_stable.architectures import registry
from hf_stable.commands.bench import collectives, scale
from hf_stable.commands.bench.cost_model import (
    BLOCK_LAUNCHES,
    Collective,
    Cost,
    measure_shape,
    step_costs,
)
from hf_stable.commands.bench.machines import MACHINES, Machine
from hf_stable.commands.bench.planning import PRESETS, make_plan
from hf_stable.commands.bench.scale import EXCHANGE, Size, bench_scale
from hf_stable.commands.bench.timing import alternate
from hf_stable.commands.main import main
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.steps import refresh

ROOT = Path(__file__).resolve().parents[3]


def test_shapes_are_those_of_the_optimizer_and_the_patch(model_type):
    model = tiny_model(model_type)
    shape = measure_shape(model, 16)
    assert shape.is_registered and shape.num_parameters == sum(
        p.numel() for p in model.parameters()
    )
    optimizer = ModelAdamW2(
        [{"params": list(model.parameters())}], structure=model, lr=1e-3, tau=1e-2
    )
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    kept = [state["weight_v"] for state in optimizer.state.values() if "weight_v" in state]
    assert sum(map(len, kept)) == len(shape.bounded)
    assert sum(v.numel() for v in kept) == sum(columns for _, columns in shape.bounded)
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    counted = step_costs(shape, num_processes=1, tokens=1)["AdamW2"].state
    small = len(optimizer.state) * 4 + len(shape.bounded) * 5  # steps; a rate and a flag per block
    assert held == counted + small
    patched = hf_stable.patch(model, "sigma_reparam")
    layers = [layer for _, layer in sigma_layers(patched)]
    assert sum(layer.num_parts for layer in layers) == len(shape.patched)
    vectors = sum(layer.sigma_u.numel() + layer.sigma_v.numel() for layer in layers)
    assert vectors == sum(map(sum, shape.patched))


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_flops_are_those_that_torch_counts(kind):
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=300, n_positions=64, n_embd=64, n_layer=3, n_head=2,
            attn_implementation="eager",
        )  # fmt: skip
        model, tokens = transformers.GPT2LMHeadModel(config), 2 * 64
        ids = torch.randint(300, (2, 64))
        inputs = {"input_ids": ids, "labels": ids}
    else:
        config = transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256,
            image_size=64, patch_size=8, attn_implementation="eager",
        )  # fmt: skip
        model, tokens = transformers.ViTForImageClassification(config), 2 * 65
        inputs = {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.tensor([0, 1])}
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    counted = counter.get_total_flops()
    predicted = step_costs(measure_shape(model), num_processes=1, tokens=tokens)["model"].flops
    assert predicted == pytest.approx(counted, rel=0.03)
    assert step_costs(measure_shape(model, 1), num_processes=1, tokens=tokens)["model"].flops < (
        0.97 * counted  # without attention's share it would be seen
    )


def test_more_processes_share_the_work_and_exchange_the_same(model_type):
    shape = measure_shape(tiny_model(model_type), 16)
    one, four = (step_costs(shape, num_processes=n, tokens=1024) for n in (1, 4))
    for part in one:
        assert four[part].flops == one[part].flops / 4 and not one[part].collectives
        assert four[part].moved == one[part].moved / 4
    assert [c.count for c in four["AdamW2"].collectives] == [2]
    assert [c.count for c in four["sigmaReparam"].collectives] == [1]
    whole = step_costs(shape, num_processes=4, tokens=1024, strategy="ddp")
    assert not whole["AdamW2"].collectives and whole["AdamW2"].moved == one["AdamW2"].moved
    assert [c.kind for c in whole["model"].collectives] == ["all-reduce"]


def test_replicas_and_cut_matrices_have_collectives_of_their_own():
    shape = measure_shape(tiny_model("gpt2"), 16)

    def found(part, **layout):
        cost = step_costs(shape, num_processes=8, tokens=1024, **layout)[part]
        return [(each.kind, each.count, each.among) for each in cost.collectives]

    assert found("AdamW2", replicas=2) == [("all-reduce", 2, 4)]
    assert found("model", replicas=2)[-1] == ("all-reduce", shape.layers + 1, 2)
    assert found("sigmaReparam", tensor_parallel=2) == [
        ("all-reduce", len(shape.patched), 2), ("all-reduce", 2, 4), ("all-reduce", 2, 2),
    ]  # fmt: skip
    assert found("AdamW2", tensor_parallel=8) == [("all-reduce", 4, 8)]
    half, quarter = (
        step_costs(shape, num_processes=8, tokens=1024, strategy="ddp", tensor_parallel=n)
        for n in (2, 4)
    )
    assert half["AdamW2"].moved == 2 * quarter["AdamW2"].moved
    assert half["model"].flops == quarter["model"].flops


def count_all_reduces(folder):
    """On each of two ranks: the all-reduces of a step of a Llama that transformers has cut."""
    cut = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=2)
    )
    layers = [layer for _, layer in sigma_layers(hf_stable.patch(cut, "sigma_reparam"))]
    optimizer = ModelAdamW2([{"params": list(cut.parameters())}], structure=cut, lr=1e-3)

    def count(work):
        with CommDebugMode() as mode:
            work()
        found = {str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items() if n}
        return found.get("all_reduce", 0), found.get("allreduce_", 0)

    tokens = torch.arange(20).view(2, 10) + 3
    for _ in range(2):  # the first step iterates more
        cut.zero_grad()
        model = count(lambda: cut(input_ids=tokens, labels=tokens).loss.backward())
        both = count(optimizer.step)
    return {"model": model, "step": both, "refresh": count(lambda: refresh(layers))}


@pytest.mark.slow
def test_the_collectives_of_a_cut_llama_are_those_that_are_counted(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    costs = step_costs(measure_shape(model), num_processes=2, tokens=20, tensor_parallel=2)
    calls = {part: [each.count for each in cost.collectives] for part, cost in costs.items()}
    for found in run_ranks(count_all_reduces, 2, tmp_path):
        products, refreshes = calls["sigmaReparam"]
        assert list(found["model"]) == [*calls["model"], products]
        assert found["refresh"] == (0, refreshes)
        assert found["step"] == (0, sum(calls["AdamW2"]) + refreshes)  # the hook comes with it


class OperationCounter(TorchDispatchMode):
    """Counts operations that do something to memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "detach" not in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["gpt2", "vit"])
def test_launches_are_about_those_of_a_block(model_type):
    layers, counts = {"gpt2": "n_layer", "vit": "num_hidden_layers"}[model_type], []
    for number in (2, 3):
        model = tiny_model(model_type, **{layers: number})
        with OperationCounter() as counter:
            model(**tiny_batch(model)).loss.backward()
        counts.append(counter.count)
    assert BLOCK_LAUNCHES / 2 < counts[1] - counts[0] < BLOCK_LAUNCHES * 1.5


def test_seconds_are_the_sum_of_work_at_its_rates():
    machine = MACHINES["h100"]
    assert machine.seconds(Cost("a", flops=machine.flops), 8) == (1.0, 0.0)
    assert machine.seconds(Cost("a", flops=1.0, bytes=machine.bandwidth), 8) == (1.0, 0.0)
    assert machine.seconds(Cost("a", product_bytes=2 * machine.products), 8) == (2.0, 0.0)
    mixed = Cost("a", bytes=machine.bandwidth, product_bytes=machine.products, launches=10)
    assert machine.seconds(mixed, 8)[0] == pytest.approx(2 + 10 * machine.launch)
    both = (
        Collective("all-reduce", 1, machine.network),
        Collective("all-gather", 2, machine.network),
    )
    assert machine.seconds(Cost("a", collectives=both), 2)[1] == pytest.approx(
        1.5 + 3 * machine.latency
    )
    assert machine.seconds(Cost("a", collectives=both), 1) == (0.0, 0.0)


def test_a_fit_finds_the_machine_that_took_the_time():
    true, draw = MACHINES["a100"], random.Random(0)
    costs = [Cost("model", flops=draw.uniform(1, 9) * 1e12, launches=9) for _ in range(3)]
    for _ in range(5):
        amounts = (draw.uniform(1, 9) * 1e8, draw.uniform(1, 9) * 1e8, draw.randrange(9, 99))
        collective = Collective("all-reduce", draw.randrange(1, 9), draw.uniform(1, 9) * 1e6)
        costs.append(Cost("AdamW2", 5.0, *amounts, collectives=(collective,)))
    found = Machine.fit(
        true.name,
        [(cost, true.seconds(cost, 1)[0]) for cost in costs],
        [(cost, 4, true.seconds(cost, 4)[1]) for cost in costs[3:]],
    )
    for name, rate in asdict(true).items():
        assert getattr(found, name) == (rate if name == "name" else pytest.approx(rate, rel=1e-6))


def test_a_fit_has_no_negative_rates():
    points = [(Cost("a", flops=w * 1e9, launches=1), 2.0 * w - 0.5) for w in (1.0, 2.0, 3.0)]
    found = Machine.fit("a", points)
    assert found.launch == 0.0 and 0 < found.flops < math.inf
    points = [(Cost("a", flops=1e9 / n, launches=n), float(n)) for n in (1, 2, 4)]
    found = Machine.fit("a", points)
    assert found.flops == math.inf and found.launch == pytest.approx(1.0)


@pytest.mark.parametrize("model", PRESETS)
def test_every_preset_has_a_plan(model, capsys):
    plan = make_plan(model, num_processes=64, tokens=2**19)
    assert plan.adamw2 > plan.plain and plan.sigma_reparam > plan.plain
    flops = plan.costs["model"].flops
    assert flops == pytest.approx(6 * plan.shape.num_parameters * 2**19 / 64, rel=0.3)
    assert plan.plain > flops / MACHINES["h100"].flops
    assert plan.shape.is_registered
    assert main(["bench", "--plan", model, "--gpus", "64"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "A step takes" in said and "is not registered" not in said
    assert main(["bench", "--plan", model, "--gpus", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plain"] == plan.plain


def test_a_plan_of_an_architecture_that_is_not_registered_says_so(own_registry, capsys):
    del registry._registry["llama"]
    assert not make_plan("7b", num_processes=64, tokens=2**19).shape.is_registered
    assert main(["bench", "--plan", "7b", "--gpus", "64"]) == 0
    assert "is not registered" in " ".join(capsys.readouterr().out.split())


def test_a_plan_knows_published_sizes():
    sizes = {"gpt2": 124.4e6, "gpt2-xl": 1557.6e6, "vit-b": 85.8e6, "7b": 6738.4e6}
    for model, size in sizes.items():
        found = make_plan(model, num_processes=1, tokens=1).shape.num_parameters
        assert math.isclose(found, size, rel_tol=0.01)


def test_a_plan_of_a_folder_is_that_of_its_model(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    plan = make_plan(str(tmp_path), num_processes=2, tokens=64, strategy="ddp")
    assert plan.shape == measure_shape(model)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--plan", "gtp2"], "no model 'gtp2' (did you mean 'gpt2'?)"),
        (["--plan", "gpt2", "--machine", "h10"], "'h10' is not known (did you mean 'h100'?)"),
        (["--plan", "gpt2", "--strategy", "zero4"], "(did you mean 'zero3'?); choose one of 'ddp'"),
        (["--plan", "gpt2", "--strategy", "zero3", "--replicas", "2"], "replicas=1"),
        (["--plan", "gpt2", "--gpus", "0"], "Invalid value for '--gpus'"),
        (["--plan", "gpt2", "sigma"], "leave out 'sigma'"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_check_predicts_sizes_that_it_was_not_fitted_to(tmp_path, monkeypatch):
    sizes = [Size("gpt2", 64, layers, 1) for layers in (1, 2, 3)]
    true, slow = MACHINES["a100"], 1.0

    def timed(subjects, rounds):
        """What a known machine takes; `slow` times as long for the size that is checked."""
        samples = alternate(subjects, rounds=rounds)
        for size in sizes:
            for part, cost in scale._costs(scale._build(size), size, 1).items():
                factor = slow if size == sizes[1] else 1.0
                samples[size.name][part] = [factor * true.seconds(cost, 1)[0]]
        return samples

    monkeypatch.setattr(scale, "alternate", timed)
    for slow in (1.0, 2.0):
        found = bench_scale(
            output=tmp_path / "s.json", rounds=1, fitted=sizes[::2], checked=sizes[1:2],
            num_processes=1,
        )  # fmt: skip
        written = json.loads((tmp_path / "s.json").read_text())
        assert len(written["results"]) == len(found) == 12
        assert sum(each.fitted for each in found) == 8
        for each, row in zip(found, written["results"], strict=True):
            factor = 1.0 if each.fitted else slow
            assert each.predicted == pytest.approx(each.measured / factor, rel=1e-6)
            assert row["error"] == each.error == each.predicted / each.measured - 1


@pytest.mark.slow
def test_the_check_times_what_two_processes_exchange():
    sizes = [Size("gpt2", 64 * n, 1, 1) for n in (1, 2, 3)]
    started = time.perf_counter()
    found = bench_scale(rounds=2, fitted=sizes[::2], checked=sizes[1:2])
    elapsed = time.perf_counter() - started
    exchanged = [each for each in found if each.part == EXCHANGE]
    assert [each.size for each in exchanged] == [sizes[0].name, sizes[2].name, sizes[1].name]
    # Seconds of one step's exchange, which two rounds of many calls took within the whole.
    assert 2 * collectives.CALLS * sum(each.measured for each in exchanged) < elapsed
    (costs,) = {len(scale._costs(scale._build(s), s, 2)["AdamW2"].collectives) for s in sizes}
    assert costs == 1 and min(each.measured for each in exchanged) > 1e-6  # no call takes less


def count_collectives() -> dict[str, list[int]]:
    """On every rank: what a patched GPT-2 under FSDP2 and AdamW2 exchanges in its second step."""
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = ModelAdamW2(
        [{"params": list(model.parameters())}], structure=model, lr=1e-3, tau=1e-2
    )
    ids = torch.arange(16).view(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # the first has ten iterations: its vectors start from nothing
    optimizer.zero_grad()
    with CommDebugMode() as exchanged:
        model(input_ids=ids, labels=ids).loss.backward()
    sizes: list[int] = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    optimizer.step()
    dist.all_reduce = original
    return {"ours": sizes, "model": list(exchanged.get_comm_counts().values())}


@pytest.mark.slow
def test_collectives_are_those_of_real_processes():
    plain = tiny_model("gpt2")
    shape = measure_shape(plain)
    costs = step_costs(shape, num_processes=2, tokens=16)
    patched = sigma_layers(hf_stable.patch(plain, "sigma_reparam"))
    # Of each gamma, a column: so many rows, one column, three iterations of four bytes.
    of_gammas = sum(3 * 4 * (layer.num_parts + 1) for _, layer in patched)
    for found in run_ranks(count_collectives, 2):
        *of_adamw2, of_refresh = found["ours"]
        (expected,) = costs["AdamW2"].collectives
        assert len(of_adamw2) == expected.count
        assert sum(of_adamw2) == expected.bytes + of_gammas
        (expected,) = costs["sigmaReparam"].collectives
        assert of_refresh == expected.bytes
        assert found["model"] == [c.count for c in costs["model"].collectives]


def test_the_page_on_scale_is_that_of_its_command(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from recipes.scale import page

    assert (ROOT / "recipes" / "scale.md").read_text() == page()
    results = json.loads((ROOT / "recipes" / "scale.json").read_text())["results"]
    parts = {row["part"] for row in results}
    assert parts >= {"model", "AdamW", "AdamW2", "sigmaReparam"}

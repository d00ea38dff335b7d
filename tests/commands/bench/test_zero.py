"""The cost model of DeepSpeed ZeRO: its counts are those of real engines on two processes."""

from __future__ import annotations

import traceback

import pytest
import torch
import torch.distributed as dist
from deepspeed_runs import told_accelerator  # noqa: F401  (a fixture for all tests here)
from gloo_ranks import run_ranks
from tiny_models import tiny_model
from tiny_training import dataset, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import hf_stable
from hf_stable.commands.bench import zero
from hf_stable.commands.bench.cost_model import Layout, measure_shape, step_costs
from hf_stable.commands.bench.layouts import LOW
from hf_stable.commands.bench.monitor_exchange import monitor_costs

SMALL = dict(PREFETCHED=1, REUSED=0, PERSISTENT=0, STEPPED=500, REDUCED=1000)
"""Sizes at which a tiny model is exchanged in as many calls as a large one at DeepSpeed's own."""

CASES = {f"zero{stage}": (f"zero{stage}", {}) for stage in (1, 2, 3)} | {
    "zero2, small": ("zero2", {"REDUCED": SMALL["REDUCED"]}),
    "zero3, small": ("zero3", SMALL),
}

IN_CONFIG = {
    "PREFETCHED": "stage3_prefetch_bucket_size",
    "REUSED": "stage3_max_reuse_distance",
    "PERSISTENT": "stage3_param_persistence_threshold",
    "STEPPED": "sub_group_size",
    "REDUCED": "reduce_bucket_size",
}

KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}

ROOMS = {"/monitor/": "monitor", "/adamw2/": "AdamW2", "/sigma_reparam/": "sigmaReparam"}


class Exchanges(TorchDispatchMode):
    """Takes note of every collective of a step: whose it is, its kind, and its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            files = [frame.filename for frame in reversed(traceback.extract_stack())]
            room = next((r for file in files for part, r in ROOMS.items() if part in file), "model")
            # The whole tensor: what a reduce-scatter is given, and the others leave behind.
            whole = args[1] if func._opname == "_reduce_scatter_base_" else args[0]
            kind = KINDS.get(func._opname, func._opname)
            self.found.append((room, kind, num_bytes(whole)))
        return func(*args, **(kwargs or {}))


def num_bytes(tensors):
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(num_bytes, tensors))


class OnlyStep(TrainerCallback):
    """Forgets what was exchanged before the last step began, and keeps what its end has seen."""

    def __init__(self, exchanges):
        self.exchanges, self.kept = exchanges, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.exchanges.found.clear()

    def on_step_end(self, args, state, control, **kwargs):
        self.kept = list(self.exchanges.found)


def on_ranks(folder):
    """The third step of each case: by then DeepSpeed knows the order of the modules."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {case: exchanged(folder / case, *CASES[case]) for case in CASES}


def exchanged(folder, strategy, sizes):
    unset_hf_deepspeed_config()
    config = {
        "zero_optimization": {"stage": int(strategy[-1])}
        | {IN_CONFIG[name]: size for name, size in sizes.items()},
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    with Exchanges() as exchanges:
        only = OnlyStep(exchanges)
        trainer = make_trainer(
            model, folder, callbacks=[hf_stable.StabilityCallback(every=1), only],
            max_steps=3, deepspeed=config, bf16=True, optim="adamw2", weight_decay=0.1,
            per_device_train_batch_size=2, save_strategy="no", logging_steps=10,
        )  # fmt: skip
        trainer.train_dataset = dataset(model)
        trainer.train()
    dist.barrier()
    return [list(each) for each in only.kept]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return run_ranks(on_ranks, 2, tmp_path_factory.mktemp("zero"))


def totals(collectives):
    """Number of calls and bytes of each kind."""
    found = {}
    for kind, count, size in collectives:
        calls, total = found.get(kind, (0, 0))
        found[kind] = calls + count, total + size
    return found


def counted(*collectives):
    return totals((each.kind, each.count, each.bytes) for each in collectives)


@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed")
@pytest.mark.parametrize("case", CASES)
def test_collectives_are_those_of_real_engines(case, ran, monkeypatch):
    strategy, sizes = CASES[case]
    for name, size in sizes.items():
        monkeypatch.setattr(zero, name, size)
    shape = measure_shape(hf_stable.patch(tiny_model("gpt2"), "sigma_reparam"))
    costs = step_costs(shape, num_processes=2, tokens=1, strategy=strategy)
    costs |= monitor_costs(shape, 2)
    more = zero.groups_exchange(shape, Layout(2, strategy))
    of_rule, of_sigma = costs["AdamW2"].collectives, costs["sigmaReparam"].collectives
    assert of_rule[-len(more) :] == more
    expected = {
        "model": counted(*costs["model"].collectives, *more),
        "AdamW2": counted(*of_rule[: -len(more)]),
        # The shape is that of a patched model, which has gamma among its parameters.
        "sigmaReparam": counted(*(each for each in of_sigma if each.kind == "all-reduce")),
        "monitor": counted(*costs["monitor"].collectives, *costs["probe"].collectives),
    }
    for exchanges in ran:
        found = {
            room: totals((kind, 1, size) for own, kind, size in exchanges[case] if own == room)
            for room in expected
        }
        assert found["AdamW2"] == expected["AdamW2"] and "all-reduce" in found["AdamW2"]
        assert found["sigmaReparam"] == expected["sigmaReparam"]
        assert bool(found["sigmaReparam"]) == (strategy == "zero3")
        assert found["monitor"]["all-reduce"] == expected["monitor"]["all-reduce"]
        calls, size = expected["monitor"]["all-gather"]
        # How long a number is when pickled, and a name, differs a little.
        assert found["monitor"]["all-gather"] == (calls, pytest.approx(size, rel=0.05))
        if sizes is not SMALL:
            assert found["model"] == expected["model"]
            continue
        calls, size = expected["model"]["all-gather"]
        own_calls, own_size = found["model"].pop("all-gather")
        # The tied embedding comes once more, and some layers gather two parameters in one call.
        assert own_size == size + LOW * shape.weights[0].numel
        assert 0.8 * calls < own_calls <= calls
        assert found["model"] == {
            kind: each for kind, each in expected["model"].items() if kind != "all-gather"
        }


def test_gamma_is_one_more_all_gather_of_zero_3_for_each_layer():
    plain, patched = (
        measure_shape(model)
        for model in (tiny_model("gpt2"), hf_stable.patch(tiny_model("gpt2"), "sigma_reparam"))
    )

    def gathered(shape, part):
        cost = step_costs(shape, num_processes=4, tokens=1, strategy="zero3")[part]
        return counted(*cost.collectives)["all-gather"]

    calls, size = gathered(plain, "sigmaReparam")
    assert calls == len(plain.reparametrised) == 8
    without, size_without = gathered(plain, "model")
    assert gathered(patched, "model") == (without + calls, size_without + size)


def test_stages_hold_what_the_engine_leaves_them():
    shape = measure_shape(tiny_model("gpt2"))
    held = [
        step_costs(shape, num_processes=4, tokens=1, strategy=f"zero{stage}")["model"].state
        / shape.num_parameters
        for stage in (1, 2, 3)
    ]
    # Weights and gradients in bfloat16, float32 masters of a quarter.
    assert held == [2 + 2 + 1, 2 + 0.5 + 1, 0.5 + 0.5 + 1]
    alone = step_costs(shape, num_processes=1, tokens=1, strategy="zero3")
    assert not any(cost.collectives for cost in alone.values())


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_a_cut_is_shared_by_the_weights_that_it_goes_through(strategy):
    shape = measure_shape(tiny_model("gpt2"))
    parts = zero.stepped(shape, Layout(2, strategy))
    for part in parts:
        middle = sum(weight.numel for weight in part.weights) / 2
        start = 0
        for weight in part.weights:
            is_cut = start < middle < start + weight.numel and bool(weight.matrices)
            assert (weight in part.shared) == is_cut
            start += weight.numel
    assert sum(len(part.shared) for part in parts) > 0
    many = zero.stepped(shape, Layout(64, strategy))
    assert sum(len(part.shared) for part in many) > sum(len(part.shared) for part in parts)

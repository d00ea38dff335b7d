"""Records of several processes, put together, are those of one that saw the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from tiny_models import tiny_batch, tiny_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hf_stable.monitor.combining import combine_records, gather_records
from hf_stable.monitor.probing import probe
from hf_stable.monitor.records import Records

SPLIT_TERMS = ("rank", "mode", "maps")
"""Of the first sequence of each process, so not those of one process."""


def sharp_model(model_type):
    """A tiny model whose attention is not that of one key as of another."""
    model = tiny_model(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 10
    return model


def recorded(model, batch):
    with probe(model, terms="all", maps=[0]) as records:
        model(**batch).loss.backward()
    model.zero_grad()
    return records


def assert_same(got, expected, path=""):
    if isinstance(expected, dict):
        assert list(got) == list(expected), path
        for key, value in expected.items():
            assert_same(got[key], value, f"{path}/{key}")
    else:
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-6), path


def without(quantities, *names):
    return {name: value for name, value in quantities.items() if name not in names}


def test_parts_of_a_batch_together_are_the_batch(model_type):
    model = sharp_model(model_type)
    batch = tiny_batch(model, size=6)
    if model_type == "bert":  # sequences of different length have different numbers of rows
        lengths = torch.tensor([12, 9, 4, 12, 7, 2])
        batch["attention_mask"] = (torch.arange(12) < lengths[:, None]).long()
    whole = recorded(model, batch).to_dict()
    halves = [
        recorded(model, {name: tensor[part] for name, tensor in batch.items()})
        for part in (slice(0, 3), slice(3, 6))
    ]
    parts, weights = [h.to_dict() for h in halves], [h.weights() for h in halves]
    together = combine_records(parts, weights)
    assert_same(without(together, *SPLIT_TERMS), without(whole, *SPLIT_TERMS))
    # It is no part's own: entropies and norms of the parts differ from those of the whole.
    for name in ("entropy", "norm_x", "norm_dx"):
        layer = next(iter(whole[name]))
        assert parts[0][name][layer] != pytest.approx(whole[name][layer], rel=1e-3), name
    layer = next(iter(whole["rank"]))
    ranks = torch.tensor([part["rank"][layer] for part in parts])
    assert together["rank"][layer] == pytest.approx(ranks.mean(0).tolist())
    assert together["maps"] == parts[0]["maps"]


def test_means_are_weighted_and_what_is_undefined_has_no_weight():
    parts = [{"entropy": {"a": [1.0, None]}}, {}, {"entropy": {"a": [4.0, 2.0], "b": [5.0]}}]
    weights = [{"entropy": {"a": [2.0, 0.0]}}, {}, {"entropy": {"a": [1.0, 3.0], "b": [1.0]}}]
    assert combine_records(parts, weights) == {"entropy": {"a": [2.0, 2.0], "b": [5.0]}}
    alone = [{"entropy": {"a": [None]}}] * 2
    assert combine_records(alone, [{}, {}]) == {"entropy": {"a": [None]}}


def test_norms_counts_and_modes_of_all_count():
    first = {"norm_x": {"a": 3.0}, "norm_dx": {"a": 3.0}, "nonfinite_x": {"a": 1.0}}
    second = {"norm_x": {"a": 4.0}, "norm_dx": {"a": 4.0}, "nonfinite_x": {"a": 2.0}}
    first["mode"], second["mode"] = {"a": ["benign", "normal"]}, {"a": ["normal", "undefined"]}
    assert combine_records([first, second], [{}, {}]) == {
        "norm_x": {"a": 5.0},
        "norm_dx": {"a": 2.5},
        "nonfinite_x": {"a": 3.0},
        "mode": {"a": ["benign", "undefined"]},
    }
    broken = combine_records([first, second | {"norm_x": {"a": None}}], [{}, {}])
    assert broken["norm_x"] == {"a": None}


def gather_with_an_idle_rank() -> dict:
    """On every rank: what all have recorded, where the last one has recorded nothing."""
    model, rank = tiny_model("gpt2"), dist.get_rank()
    batch = {name: tensor[2 * rank :][:2] for name, tensor in tiny_batch(model).items()}
    records = recorded(model, batch) if rank < dist.get_world_size() - 1 else Records()
    return gather_records(records, model)


@pytest.mark.slow
def test_a_rank_without_records_holds_nobody_up():
    found = run_ranks(gather_with_an_idle_rank, 3)
    assert found[0] == found[1] == found[2]
    model = tiny_model("gpt2")
    whole = recorded(model, tiny_batch(model)).to_dict()
    assert_same(found[0]["entropy"], whole["entropy"])
    assert "maps" in found[0]


def test_layers_are_called_the_same_with_activation_checkpointing():
    model = tiny_model("gpt2")
    batch = tiny_batch(model)
    plain = recorded(model, batch).to_dict()
    for index, block in enumerate(model.transformer.h):
        model.transformer.h[index] = checkpoint_wrapper(block)
    assert any("_checkpoint_wrapped" in name for name, _ in model.named_modules())
    wrapped = recorded(model, batch).to_dict()
    assert_same(without(wrapped, *SPLIT_TERMS), without(plain, *SPLIT_TERMS))
    assert list(wrapped["rank"]) == list(plain["rank"])

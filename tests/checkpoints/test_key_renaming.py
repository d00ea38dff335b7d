"""Tensors that a model joins or splits when it reads them, from one file or from several."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_architectures import build

from hf_stable.checkpoints.key_renaming import KeyConversion
from hf_stable.checkpoints.weight_files import open_weights


@pytest.fixture(params=["mixtral", "qwen3_moe", "dinov2, gated"])
def saved(request, tmp_path):
    model = build(request.param)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    files = open_weights(tmp_path).files
    assert len(files) > 2
    return model, tmp_path, [load_file(file) for file in files]


def test_shards_give_what_the_model_has(saved):
    model, folder, shards = saved
    convert = KeyConversion(model, keys=open_weights(folder).shapes)
    found = {name: each for shard in shards for name, each in convert(shard).items()}
    own = model.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    on_disk = {key for shard in shards for key in shard}
    assert on_disk != own.keys()


def test_the_order_of_shards_does_not_count(saved):
    model, folder, shards = saved
    convert = KeyConversion(model, keys=open_weights(folder).shapes)
    found = {name: each for shard in reversed(shards) for name, each in convert(shard).items()}
    own = model.state_dict()
    assert all(torch.equal(found[name], own[name]) for name in own)


def test_without_a_list_of_keys_a_state_dict_is_whole(saved):
    model, _, shards = saved
    whole = {key: tensor for shard in shards for key, tensor in shard.items()}
    found = KeyConversion(model)(whole)
    own = model.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)


def test_names_in_memory_and_unknown_ones_stay(saved):
    model, _, _ = saved
    given = {**model.state_dict(), "mine": torch.ones(1)}
    found = KeyConversion(model)(given)
    assert found.keys() == given.keys()
    assert all(found[name] is given[name] for name in given)

"""AdamW2 over given groups: they are parted, and what belongs to them follows."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from tiny_models import tiny_model

from hf_stable.adamw2.model_optimizer import ModelAdamW2


def test_groups_are_parted_and_never_joined():
    model = tiny_model("gpt2")
    weights = list(model.parameters())
    half = len(weights) // 2
    given = [
        {"params": weights[:half], "weight_decay": 0.1},
        {"params": weights[half:], "weight_decay": 0.1},
        {"params": []},
    ]
    groups = ModelAdamW2(given, structure=model, lr=0.1).param_groups
    first = {id(weight) for weight in weights[:half]}
    sides = [{id(param) in first for param in group["params"]} for group in groups]
    assert all(len(side) == 1 for side in sides)
    assert {True, False} == set().union(*sides)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("way", ["new", "deepcopy", "pickle"])
@pytest.mark.parametrize("lora", ["factors", "merged"])
def test_a_state_over_the_given_groups_is_parted_like_them(lora, way):
    model = peft.get_peft_model(tiny_model("gpt2"), peft.LoraConfig(r=2, target_modules=["c_fc"]))
    trained = [param for param in model.parameters() if param.requires_grad]
    given = [{"params": trained[1:]}, {"params": []}, {"params": trained[:1]}]
    if lora == "merged":
        given = [{"params": []}, {"params": trained[::-1]}]
    theirs = torch.optim.AdamW([dict(group) for group in given], lr=0.3)
    for param in trained:
        param.grad = torch.randn_like(param)
    theirs.step()
    optimizer = ModelAdamW2(given, structure=model, lora=lora, lr=0.1)
    if way == "deepcopy":
        optimizer, trained = copy.deepcopy((optimizer, trained))
    elif way == "pickle":
        optimizer, trained = pickle.loads(pickle.dumps((optimizer, trained)))
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    originals = [param for param in model.parameters() if param.requires_grad]
    for mine, original in zip(trained, originals, strict=True):
        moments = optimizer.state[mine]["exp_avg"], theirs.state[original]["exp_avg"]
        assert torch.equal(*moments) and moments[0].any()
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}
    assert len(optimizer.state) == len(trained)  # none for frozen weights
    short = copy.deepcopy(theirs.state_dict())
    short["param_groups"].pop()
    with pytest.raises(ValueError, match="loaded state dict"):
        optimizer.load_state_dict(short)


def test_values_per_group_are_those_of_the_given_group():
    model = tiny_model("gpt2")
    weights = list(model.parameters())
    optimizer = ModelAdamW2(
        [{"params": weights[:4]}, {"params": weights[4:]}], structure=model, lr=0.1
    )
    own = len(optimizer.param_groups)
    assert own > 2
    spread = optimizer.per_group(["a", "b"])
    assert len(spread) == own and spread == sorted(spread) and set(spread) == {"a", "b"}
    assert optimizer.per_group(range(own)) == list(range(own))
    with pytest.raises(ValueError, match="7 values are neither one for each of the 2 given"):
        optimizer.per_group(range(7))

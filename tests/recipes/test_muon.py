"""Muon with AdamW: who has which weight, one schedule for both, and a run that goes on."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes import data, muon  # noqa: E402
from recipes.models import build  # noqa: E402
from recipes.run import run  # noqa: E402
from recipes.settings import Settings  # noqa: E402

BETAS = (0.9, 0.95)


@pytest.mark.parametrize("model", ["vit", "gpt2", "llama"])
def test_matrices_of_blocks_are_muons_and_everything_else_adamws(model):
    task = data.digits() if model == "vit" else data.next_tokens()
    built = build(Settings(model=model, init="xavier"), task)
    optimizer = muon.muon_with_adamw(built, lr=0.01, weight_decay=0.1, betas=BETAS)
    names = {id(each): name for name, each in built.named_parameters()}
    theirs = [
        {names.pop(id(each)) for group in part.param_groups for each in group["params"]}
        for part in optimizer.parts
    ]
    assert not names and not theirs[0] & theirs[1]
    assert all(".h." in name or ".layers." in name for name in theirs[0])
    assert any("mlp" in name for name in theirs[0])
    assert all(built.get_parameter(name).ndim == 2 for name in theirs[0])
    left = {name for name in theirs[1] if built.get_parameter(name).ndim > 1}
    assert left and not any(".h." in name or ".layers." in name for name in left)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert all(each.ndim == 1 for each in optimizer.param_groups[2]["params"])


def two(seed=0):
    torch.manual_seed(seed)
    matrix, vector = (torch.nn.Parameter(torch.randn(size)) for size in ((4, 3), (5,)))
    options = dict(lr=0.1, weight_decay=0.0)
    optimizer = muon.MuonWithAdamW(
        torch.optim.Muon([matrix], **options), torch.optim.AdamW([vector], **options)
    )
    return (matrix, vector), optimizer


def step(weights, optimizer, number):
    for each in weights:
        each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(number))
    optimizer.step()


def test_each_part_moves_its_weights_as_it_would_alone_under_one_schedule():
    weights, optimizer = two()
    (matrix, vector), _ = two()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    alone = [torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0),
             torch.optim.AdamW([vector], lr=0.1, weight_decay=0.0)]  # fmt: skip
    for number in range(3):
        step(weights, optimizer, number)
        schedule.step()
        for part, each in zip(alone, (matrix, vector), strict=True):
            step([each], part, number)
            part.param_groups[0]["lr"] *= 0.5
    for own, other in zip(weights, (matrix, vector), strict=True):
        assert torch.equal(own, other)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0125, 0.0125]


def test_state_that_was_saved_goes_on_where_it_was():
    weights, optimizer = two()
    step(weights, optimizer, 0)
    again, loaded = two(seed=1)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for own, other in zip(again, weights, strict=True):
            own.copy_(other)
    fresh, forgot = two()
    with torch.no_grad():
        for own, other in zip(fresh, weights, strict=True):
            own.copy_(other)
    for each, by in ((weights, optimizer), (again, loaded), (fresh, forgot)):
        step(each, by, 1)
    for own, other, third in zip(again, weights, fresh, strict=True):
        assert torch.equal(own, other) and not torch.equal(own, third)


def test_a_recipe_trains_with_it(tmp_path):
    settings = Settings(
        init="xavier", learning_rate=1e-2, steps=6, batch_size=8, monitor_every=0,
        model_config={"num_hidden_layers": 1}, output=str(tmp_path / "muon"), optim="torch:Muon",
    )  # fmt: skip
    own = run(settings)
    other = run(replace(settings, optim="adamw_torch", output=str(tmp_path / "adamw")))
    assert own["losses"][0] == other["losses"][0] and own["losses"] != other["losses"]
    assert own["losses"][-1] < own["losses"][0]


def test_a_torch_without_muon_is_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"has no Muon, which came with 2\.9; upgrade torch"):
        muon.muon_with_adamw(None, lr=0.1, weight_decay=0.0, betas=BETAS)

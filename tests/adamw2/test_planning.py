"""tau="auto": what it comes to, what it keeps when it is loaded, and what it refuses."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.adamw2.planning import DEFAULT_TAU, DISTANCE, HIGHEST_TAU, plan_tau


def weight(seed=0):
    return nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)))


def train(optimizer, param, steps):
    """Follow a gradient that always points the same way, as fast as tau allows."""
    for _ in range(steps):
        param.grad = -torch.outer(torch.ones(6), torch.ones(4))
        optimizer.step()


def test_a_weight_gets_as_far_in_a_short_run_as_in_a_longer_one():
    def distance(steps, **options):
        param = weight()
        before = param.detach().clone()
        optimizer = AdamW2([param], lr=100.0, betas=(0.0, 0.99), weight_decay=0.0, **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):  # one direction after another
            param.grad = torch.randn(6, 4, generator=generator)
            optimizer.step()
        moved, size = (torch.linalg.matrix_norm(m, 2) for m in (param.detach() - before, before))
        return float(moved / size)

    planned = [distance(steps, tau="auto", total_steps=steps) for steps in (20, 180)]
    fixed = [distance(steps) for steps in (20, 180)]
    # Of 24 entries, so by chance more or less; a random walk of nine times the steps goes three
    # times as far.
    assert all(DISTANCE / 2 < found < DISTANCE * 2 for found in planned)
    assert max(planned) < 1.5 * min(planned) and fixed[1] > 2 * fixed[0]


def test_the_rule_is_bounded_by_the_default_and_the_highest():
    steps = [1, 2, 3, 60, 224, 225, 1000, 10**6]
    taus = [plan_tau(each) for each in steps]
    assert taus == sorted(taus, reverse=True)
    assert (taus[0], taus[-1]) == (HIGHEST_TAU, DEFAULT_TAU)
    free = [(tau, n) for tau, n in zip(taus, steps, strict=True) if DEFAULT_TAU < tau < HIGHEST_TAU]
    assert len(free) == 3
    for tau, n in free:
        assert math.isclose(tau * math.sqrt(n), DISTANCE, rel_tol=1e-9)


def test_a_long_run_is_that_of_the_default_bit_for_bit():
    runs = []
    for options in ({"tau": "auto", "total_steps": 5000}, {}, {"tau": "auto", "total_steps": 50}):
        param = weight()
        train(AdamW2([param], lr=1.0, **options), param, 3)
        runs.append(param.detach())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_groups_derive_their_own_and_a_copy_steps_alike():
    first, second, third = weight(1), weight(2), weight(3)
    optimizer = AdamW2(
        [
            {"params": [first]},
            {"params": [second], "tau": math.inf},
            {"params": [third], "tau": "auto", "total_steps": 30},
        ],
        tau="auto",
        total_steps=100,
    )
    assert [g["tau"] for g in optimizer.param_groups] == [plan_tau(100), math.inf, plan_tau(30)]
    copied = copy.deepcopy(optimizer)
    train(optimizer, first, 2)
    train(copied, copied.param_groups[0]["params"][0], 2)
    assert torch.equal(first, copied.param_groups[0]["params"][0])
    assert "total_steps: 100" in repr(optimizer) and f"tau: {plan_tau(100)}" in repr(optimizer)


@pytest.mark.parametrize(
    ("saved", "own", "said"),
    [
        ({"tau": "auto", "total_steps": 50}, {"tau": "auto", "total_steps": 100},
         r"goes on with tau=0\.02121 \(tau='auto' over 50 steps\).* and not with tau=0\.015"),
        ({"tau": 0.004}, {"tau": "auto", "total_steps": 100},
         r"goes on with tau=0\.004, as the loaded state says, and not with tau=0\.015"),
        ({"tau": "auto", "total_steps": 50}, {"tau": 0.004},
         r"goes on with tau=0\.02121 .* and not with tau=0\.004"),
    ],
)  # fmt: skip
def test_a_loaded_state_keeps_its_tau_and_that_is_said(saved, own, said):
    param, other = weight(), weight()
    first, second = AdamW2([param], **saved), AdamW2([other], **own)
    train(first, param, 2)
    other.data.copy_(param.detach())
    with pytest.warns(UserWarning, match=said):
        second.load_state_dict(first.state_dict())
    for optimizer, each in ((first, param), (second, other)):
        train(optimizer, each, 2)
    assert torch.equal(param, other)
    assert second.param_groups[0]["tau"] == first.param_groups[0]["tau"]


def test_the_same_plan_and_a_state_of_adamw_load_without_a_word():
    param = weight()
    adamw = torch.optim.AdamW([param])
    train(adamw, param, 1)
    planned = AdamW2([param], tau="auto", total_steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned.load_state_dict(adamw.state_dict())
        assert planned.param_groups[0]["tau"] == plan_tau(50)
        planned.load_state_dict(AdamW2([param], tau="auto", total_steps=50).state_dict())
        AdamW2([param]).load_state_dict(AdamW2([param], tau=0.004).state_dict())  # both were given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": "auto"}, "cannot derive tau='auto' without the length of the run: give total_st"),
        ({"total_steps": 100}, "got total_steps=100 beside tau=0.01: total_steps is what tau='aut"),
        ({"tau": "auto", "total_steps": 0}, "cannot use total_steps=0: give the number of steps"),
        ({"tau": "auto", "total_steps": math.inf}, "cannot use total_steps=inf"),
        ({"tau": "auto", "total_steps": True}, "cannot use total_steps=True"),
        ({"tau": "auto", "total_steps": "100"}, "cannot use total_steps='100'"),
        ({"tau": "automatic"}, "cannot use tau='automatic': give a number > 0; inf switches"),
    ],
)
def test_bad_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW2([weight()], **options)

"""States that AdamW2 loads: what hooks make of them, those of other optimizers, and broken ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hf_stable.adamw2.optimizer import AdamW2

INF = math.inf
SHAPES = ((3, 5), (5, 3), (3, 5), (4,))


def make_params(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer, params, steps, *, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def trained(cls, params, steps=3, **options):
    optimizer = cls(params, **options)
    train(optimizer, params, steps)
    return optimizer


def everything(optimizer, params):
    """A copy of all that loading could change."""
    return copy.deepcopy((optimizer.state_dict(), [param.detach() for param in params]))


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


# ---- hooks ----


def test_a_hook_may_give_the_parameters_another_order():
    """As torch documents it: the state's entries under other labels, before anything is checked."""
    order = [1, 2, 3, 0]
    params = make_params()
    optimizer = trained(AdamW2, params, lr=1e-2, tau=0.004)
    state = copy.deepcopy(optimizer.state_dict())
    turned = [nn.Parameter(params[i].detach().clone()) for i in order]
    other = AdamW2(turned, lr=1e-2, tau=0.004)
    with pytest.raises(ValueError, match="another order"):
        other.load_state_dict(state)

    def reorder(_, given):
        entries = {new: given["state"][old] for new, old in enumerate(order)}
        return {**given, "state": entries}

    other.register_load_state_dict_pre_hook(reorder)
    other.load_state_dict(state)
    train(optimizer, params, 1, start=9)
    for mine, i in zip(turned, order, strict=True):
        mine.grad = params[i].grad
    other.step()
    assert all(torch.equal(mine, params[i]) for mine, i in zip(turned, order, strict=True))


def test_a_hook_that_changes_its_copy_in_place_counts():
    params = make_params()
    state = trained(AdamW2, params, lr=1e-2).state_dict()
    optimizer = AdamW2(params)

    def slow_down(_, given):
        given["param_groups"] = [{**group, "lr": 1e-5} for group in given["param_groups"]]

    handle = optimizer.register_load_state_dict_pre_hook(slow_down)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-5
    handle.remove()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_hooks_afterwards_see_the_whole_state():
    params = make_params()
    state = trained(AdamW2, params).state_dict()
    optimizer = AdamW2(params)
    seen = []
    optimizer.register_load_state_dict_post_hook(
        lambda optimizer: seen.append({key for s in optimizer.state.values() for key in s}),
        prepend=True,
    )
    for _ in range(2):  # nothing of the first time is left
        optimizer.load_state_dict(state)
    assert len(seen) == 2 and seen[0] == seen[1] >= {"weight_v", "exempt", "effective_lr"}


# ---- torch's AdamW ----


def test_what_has_only_begun_is_not_held_back_after_adamw():
    """A bias one step old is as large as the step was: its size is no scale for the next."""
    bias, gain, weight = (
        nn.Parameter(torch.zeros(6)),
        nn.Parameter(torch.ones(6)),
        nn.Parameter(torch.randn(6, 6)),
    )
    params = [bias, gain, weight]
    theirs = trained(torch.optim.AdamW, params, 1, lr=1e-3, weight_decay=0)
    optimizer = AdamW2(params, tau=0.004)
    optimizer.load_state_dict(theirs.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    train(optimizer, params, 1, start=1)
    assert [optimizer.state[param]["exempt"].item() for param in params] == [True, False, False]
    rates = list(optimizer.effective_lr().values())
    assert rates[0] == pytest.approx(1e-2)
    assert max(rates[1:]) < 0.9e-2
    # Decided once: the rule does not come back when the weight has grown, nor after loading.
    train(optimizer, params, 30, start=2)
    again = AdamW2(params)
    again.load_state_dict(optimizer.state_dict())
    train(again, params, 1, start=40)
    assert again.effective_lr()[bias] == pytest.approx(1e-2)


def test_adam_without_decay_has_the_same_moments():
    params = make_params()
    theirs = trained(torch.optim.Adam, params, lr=1e-2)
    optimizer = AdamW2(params)
    optimizer.load_state_dict(theirs.state_dict())
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], theirs.state[params[0]]["exp_avg"])


def test_rates_after_loading_are_those_of_the_last_step_or_none():
    params = make_params(((4, 4), (4, 4)))
    groups = [dict(params=params[:1], tau=INF), dict(params=params[1:])]
    optimizer = AdamW2(groups, lr=1e-2)
    theirs = torch.optim.AdamW([dict(params=params[:1]), dict(params=params[1:])], lr=0.5)
    train(theirs, params, 1)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.effective_lr() == {}
    train(optimizer, params, 1)
    assert optimizer.effective_lr()[params[0]] == 0.5
    other = AdamW2([dict(params=params[:1], tau=INF), dict(params=params[1:])], lr=1e-5)
    other.load_state_dict(optimizer.state_dict())
    assert other.effective_lr() == optimizer.effective_lr()


# ---- states that cannot be continued: each is refused before anything has changed ----


def without(key):
    def edit(state):
        del state["state"][1][key]

    return edit


def with_option(**options):
    def edit(state):
        state["param_groups"][0] |= options

    return edit


def with_entry(key, value):
    def edit(state):
        state["state"][1][key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_option(tau=-1), "group 0 of the loaded state: AdamW2 cannot use tau=-1"),
        (with_option(betas=(0.9,)), r"loaded state: AdamW2 cannot use betas=\(0.9,\)"),
        (with_option(lr=math.nan), "loaded state: Invalid learning rate: nan"),
        (with_option(parts=((1, 1), 1, 0, False)), r"Parts.* does not fit .* \(3, 5\)"),
        (without("exp_avg"), r"has no 'exp_avg' for its parameter \(5, 3\)"),
        (without("step"), "has no 'step'"),
        (with_entry("weight_v", torch.randn(1, 4)), r"weight_v has shape \(1, 4\).*needs \(1, 3\)"),
        (with_entry("weight_v", torch.randn(2, 3)), r"weight_v has shape \(2, 3\).*needs \(1, 3\)"),
        (with_entry("exempt", torch.zeros(3)), r"exempt has shape \(3,\).*needs \(1,\)"),
        (with_entry("exp_avg_sq", torch.ones(3, 5)), r"another model or another order"),
        (lambda state: state.pop("param_groups"), "no 'param_groups'"),
        (lambda state: state.pop("state"), "no 'state'"),
    ],
)
def test_a_broken_state_changes_nothing(edit, message):
    params = make_params()
    state = copy.deepcopy(trained(AdamW2, params, lr=0.5, weight_decay=0.5).state_dict())
    edit(state)
    optimizer = trained(AdamW2, params, 1)
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same(everything(optimizer, params), before)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (torch.optim.SGD, {}, "has no betas and no eps"),
        (torch.optim.SGD, dict(momentum=0.9), "has no betas and no eps"),
        (torch.optim.RMSprop, {}, "has no betas"),
        (torch.optim.Adagrad, {}, "has no betas"),
        (torch.optim.Adamax, {}, "'exp_inf'"),
        (torch.optim.NAdam, {}, "'mu_product'"),
        (torch.optim.Adam, dict(weight_decay=0.1), r"weight_decay=0\.1 that is part of the grad"),
        (torch.optim.AdamW, dict(amsgrad=True), "amsgrad=True"),
    ],
)
def test_another_optimizers_state_changes_nothing(cls, options, message):
    params = make_params()
    state = trained(cls, params, lr=0.5, **options).state_dict()
    optimizer = trained(AdamW2, params, 1)
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same(everything(optimizer, params), before)
    optimizer.load_state_dict(trained(torch.optim.AdamW, params, lr=0.5).state_dict())
    assert not same(everything(optimizer, params), before)


def test_a_state_of_some_parameters_leaves_the_others_new():
    params = make_params()
    optimizer = AdamW2(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    other = AdamW2(params)
    other.load_state_dict(optimizer.state_dict())
    train(other, params, 1)
    assert [other.state[param]["step"].item() for param in params] == [2, 1, 1, 1]

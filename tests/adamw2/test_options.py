"""Options of AdamW2 beside those of AdamW: what one takes the other takes, with the same errors."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from torch import nn

from hf_stable.adamw2.optimizer import AdamW2

RATE, FIRST, SECOND = torch.tensor(0.01), torch.tensor(0.8), torch.tensor([[0.99]])

TAKEN = {
    "default": {},
    "lr": dict(lr=0.01),
    "tensor lr": dict(lr=RATE),
    "tensor betas": dict(betas=(FIRST, SECOND)),
    "tensor betas in a list": dict(betas=[FIRST, FIRST]),
    "eps": dict(eps=1e-6),
    "weight_decay": dict(weight_decay=0.1),
    "no decay": dict(weight_decay=0),
    "maximize": dict(weight_decay=0.1, maximize=True),
    "foreach": dict(foreach=True),
    "no foreach": dict(foreach=False),
    "fused": dict(fused=True),
    "neither": dict(foreach=False, fused=False),
    "not differentiable": dict(differentiable=False),
    "no amsgrad": dict(amsgrad=False),
    "everything by place": (0.02, (0.8, 0.99), 1e-7, 0.1, False),
}

REFUSED = {
    "negative lr": dict(lr=-0.5),
    "lr of two": dict(lr=torch.tensor([0.1, 0.2])),
    "negative eps": dict(eps=-1.0),
    "beta of one": dict(lr=1e-2, betas=(1.0, 0.0)),
    "negative second beta": dict(betas=(0.9, -0.5)),
    "negative decay": dict(lr=1e-2, weight_decay=-1),
    "tensor lr and foreach": dict(lr=RATE, foreach=True),
    "one beta a tensor": dict(betas=(0.9, SECOND)),
    "the other beta a tensor": dict(betas=(FIRST, 0.99)),
    "fused and foreach": dict(fused=True, foreach=True),
}


def weight(seed=0):
    return nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))


def build(cls, options, params=None, **more):
    params = [weight()] if params is None else params
    if isinstance(options, tuple):
        return cls(params, *options, **more)
    return cls(params, **options, **more)


def step_twice(optimizer):
    (param,) = optimizer.param_groups[0]["params"]
    for seed in (1, 2):
        param.grad = weight(seed).detach()
        optimizer.step()
    return param


@pytest.mark.parametrize("options", TAKEN.values(), ids=TAKEN)
def test_what_adamw_takes_is_taken_and_means_the_same(options):
    theirs = step_twice(build(torch.optim.AdamW, options))
    ours = step_twice(build(AdamW2, options, tau=math.inf))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not torch.equal(ours, weight())
    bound = step_twice(build(AdamW2, options, tau=1e-4))
    assert not torch.allclose(bound, ours, rtol=1e-4)


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_adamw_refuses_is_refused_in_its_words(options):
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        build(torch.optim.AdamW, options)
    with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
        build(AdamW2, options)
    optimizer = AdamW2([weight()])
    with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
        optimizer.add_param_group(dict(params=[weight(1)], **options))
    assert len(optimizer.param_groups) == 1


SHARED = weight(5)
PARAMS = {
    "a bare tensor": SHARED,
    "twice in a group": [SHARED, SHARED],
    "twice in groups": [{"params": SHARED}, {"params": SHARED}],
    "some with names": [("weight", SHARED), weight()],
    "some groups with names": [{"params": [SHARED]}, {"params": [("weight", weight())]}],
    "none": [],
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_parameters_that_adamw_refuses_are_refused_in_its_words(params):
    def outcome(cls):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                cls(params)
            except Exception as error:
                return type(error), str(error)

    assert outcome(torch.optim.AdamW) is not None
    assert outcome(AdamW2) == outcome(torch.optim.AdamW)


@pytest.mark.parametrize("option", ["amsgrad", "differentiable"])
def test_what_it_has_not_is_refused_in_one_sentence_wherever_it_is_asked_for(option):
    with pytest.raises(ValueError, match=f"AdamW2 has no {option}=True: .*Leave it out$"):
        AdamW2([weight()], **{option: True})
    with pytest.raises(ValueError, match=f"AdamW2 has no {option}=True"):
        AdamW2([{"params": [weight()], option: True}])


def test_tensors_that_are_no_number_are_refused():
    with pytest.raises(ValueError, match=r"Tensor betas\[0\] must be 1-element, got \(2,\)"):
        AdamW2([weight()], betas=(torch.tensor([0.9, 0.8]), FIRST))


def test_capturable_asks_for_no_device_of_its_own():
    """torch's AdamW refuses the step on a CPU; that of AdamW2 is the same either way."""
    captured = step_twice(AdamW2([weight()], lr=RATE, capturable=True))
    assert torch.equal(captured, step_twice(AdamW2([weight()], lr=RATE)))


def test_the_choice_of_kernels_changes_no_bit():
    results = [
        step_twice(AdamW2([weight()], lr=0.1, foreach=foreach, fused=fused))
        for foreach, fused in [(None, None), (True, None), (False, False), (None, True)]
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_state_saved_with_tensor_betas_is_continued():
    adamw = torch.optim.AdamW([weight()], betas=(FIRST, SECOND))
    step_twice(adamw)
    optimizer = AdamW2([weight()], fused=True)
    optimizer.load_state_dict(adamw.state_dict())
    group = optimizer.param_groups[0]
    assert group["betas"] == (pytest.approx(0.8), pytest.approx(0.99)) and group["fused"] is True

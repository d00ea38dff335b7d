"""Out of memory and Ctrl-C at every point of patch, fold and restore: the model stays whole."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from faults import OutOfMemoryAt, count_lines, count_operations, interrupt_at, list_lines
from tiny_models import sgd_steps, tiny_batch, tiny_model
from torch import nn

import hf_stable
from hf_stable.methods import patching
from hf_stable.methods.sigma_reparam.steps import live_layers
from hf_stable.methods.undoing import keep_attributes, undoing

METHODS = {"gpt2": ["sigma_reparam", "remove_pre_layernorm"], "vit": ["sigma_reparam"]}

FAULTS = {"out of memory": (count_operations, OutOfMemoryAt), "Ctrl-C": (count_lines, interrupt_at)}

QUICK_POINTS, SLOW_POINTS = 6, 60
"""Points of the quick and of the slow suite, evenly spread: of the slow one so many that each
function of a layer's change is met at several of its lines."""

CASES = [
    *itertools.product(METHODS, ("patch", "fold"), FAULTS),
    ("gpt2", "restore_layernorms", "Ctrl-C"),  # it computes nothing
]


def plain(model_type: str) -> nn.Module:
    return tiny_model(model_type)


def patched(model_type: str) -> nn.Module:
    """A patched model as training leaves it."""
    model = hf_stable.patch(tiny_model(model_type), METHODS[model_type])
    sgd_steps(model)
    return model


WORK: dict[str, tuple[Callable[[str], nn.Module], Callable[[nn.Module, str], Any]]] = {
    "patch": (plain, lambda model, model_type: hf_stable.patch(model, METHODS[model_type])),
    "restore_layernorms": (patched, lambda model, model_type: hf_stable.restore_layernorms(model)),
    "fold": (patched, lambda model, model_type: hf_stable.fold(model)),
}


def describe(model: nn.Module) -> dict[str, Any]:
    """Everything that a change of the model would show in."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "configs": getattr(model, "hf_stable_configs", None),
        "followed": sorted(
            layer.layer_name for layer in live_layers() if any(m is layer for m in model.modules())
        ),
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    states = first.pop("state"), second.pop("state")
    assert first == second
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_batch(model)).logits


@pytest.mark.filterwarnings("ignore:fold keeps the")
@pytest.mark.parametrize(
    "most", [QUICK_POINTS, pytest.param(SLOW_POINTS, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize(("model_type", "what", "fault"), CASES)
def test_a_fault_leaves_a_whole_model_and_a_second_call_works(model_type, what, fault, most):
    make, work = WORK[what]
    count, inject = FAULTS[fault]
    model = make(model_type).eval()
    whole = work(copy.deepcopy(model), model_type)
    expected = output(whole)
    counted = copy.deepcopy(model)
    describe(counted)  # a copy settles when its state is looked at
    num_points = count(lambda: work(counted, model_type))
    stride = max(1, num_points // most)
    for point in range(1, num_points + 1, stride):
        twin = copy.deepcopy(model)
        untouched = describe(twin)
        with pytest.raises((torch.OutOfMemoryError, KeyboardInterrupt), match="injected"):
            with inject(point):
                work(twin, model_type)
        if is_done(twin, what):  # the fault came after the last change
            torch.testing.assert_close(output(twin), expected, rtol=0, atol=0)
        else:
            assert_same(untouched, describe(twin))
        work(twin, model_type)
        torch.testing.assert_close(output(twin), expected, rtol=0, atol=0)
        assert_same(describe(whole), describe(twin))


def is_done(model: nn.Module, what: str) -> bool:
    if what == "patch":
        return hf_stable.is_patched(model)
    if what == "fold":  # removed norms stay removed
        return not hf_stable.describe(model).num_patched
    return not any("Removed" in type(module).__name__ for module in model.modules())


def test_without_what_undoes_it_a_fault_would_leave_a_half_changed_model(monkeypatch):
    """It is no idle check: the faults come while a model is being changed."""
    model = plain("gpt2")
    whole = hf_stable.patch(copy.deepcopy(model), "sigma_reparam")
    lines = list_lines(lambda: hf_stable.patch(copy.deepcopy(model), "sigma_reparam"))
    changing = [point for point, name in enumerate(lines, 1) if name == "install"]
    monkeypatch.setattr(patching, "undoing", lambda: nullcontext([]))
    twin = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt), interrupt_at(changing[len(changing) // 2]):
        hf_stable.patch(twin, "sigma_reparam")
    classes = [[type(module) for module in each.modules()] for each in (model, twin, whole)]
    assert classes[0] != classes[1] != classes[2]


def test_what_was_kept_comes_back_in_the_reverse_order():
    order: list[str] = []
    with pytest.raises(RuntimeError, match="why"), undoing() as undo:
        undo.append(lambda: order.append("first"))
        undo.append(lambda: order.append("second"))
        raise RuntimeError("why")
    assert order == ["second", "first"]
    with undoing() as undo:
        undo.append(lambda: order.append("never"))
    assert "never" not in order


def test_attributes_children_parameters_and_class_come_back():
    class Other(nn.Sequential):
        pass

    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    weight, first = module[0].weight, module[0]
    outer, inner = keep_attributes(module), keep_attributes(first)
    module.__class__ = Other
    module[1] = nn.Identity()
    module.note = "new"
    first.register_buffer("extra", torch.ones(1), persistent=False)
    first.weight = nn.Parameter(torch.zeros(3, 2))
    inner()
    outer()
    assert type(module) is nn.Sequential and isinstance(module[1], nn.ReLU)
    assert module[0] is first and first.weight is weight and not hasattr(module, "note")
    assert not first._non_persistent_buffers_set and module.state_dict().keys() == {
        "0.weight",
        "0.bias",
    }

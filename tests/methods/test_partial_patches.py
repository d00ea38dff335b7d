"""A patch that leaves out what nobody asked to leave out says so, with the count and the reason."""

from __future__ import annotations

import warnings

import pytest
from tiny_models import MODEL_TYPES, tiny_model
from torch import nn

import hf_stable


def warnings_of(model: nn.Module, **options) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hf_stable.patch(model, "sigma_reparam", **options)
    return [each for each in caught if "matrices are patched" in str(each.message)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_whole_patch_is_silent(model_type):
    assert not warnings_of(tiny_model(model_type))


def shared_module():
    model = tiny_model("vit")
    model.vit.layers[1] = model.vit.layers[0]
    return model


def shared_weights():
    model = tiny_model("vit")
    for name in ("q_proj", "k_proj"):
        first, second = (getattr(layer.attention, name) for layer in model.vit.layers)
        second.weight = first.weight
    return model


@pytest.mark.parametrize(
    ("make", "patched", "total", "skipped"),
    [(shared_module, 1, 8, 6), (shared_weights, 9, 14, 4)],
    ids=["module", "weights"],
)
def test_shared_layers_do_not_pass_without_a_word(make, patched, total, skipped):
    model = make()
    (warning,) = warnings_of(model)
    message = str(warning.message)
    assert message.startswith(f"{patched} of {total} matrices are patched.")
    assert f"are {skipped}: 'vit.layers.0.attention.q_proj' (tied to " in message
    assert warning.filename == __file__
    report = hf_stable.describe(model)
    assert (report.num_patched, len(report.layers)) == (patched, total)


def test_leaving_them_out_by_name_is_silent():
    assert not warnings_of(shared_weights(), exclude=["*q_proj", "*k_proj"])


def test_a_head_that_was_asked_for_and_is_tied_is_named():
    (warning,) = warnings_of(tiny_model("gpt2"), heads="include")
    assert "is 1: 'lm_head' (tied to transformer.wte.weight)" in str(warning.message)
    assert not warnings_of(tiny_model("gpt2"))


class Both(nn.Module):
    """A registered model, and one that is not."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.vit = tiny_model("vit").vit
        self.rest = nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))


@pytest.mark.parametrize(("num_layers", "is_most"), [(2, False), (40, True)])
def test_a_model_most_of_which_is_of_no_entry_is_named(num_layers, is_most):
    found = warnings_of(Both(num_layers))
    assert len(found) == is_most
    if found:
        assert "'rest.0' (outside the models that are registered)" in str(found[0].message)

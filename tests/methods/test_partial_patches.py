"""A patch that leaves out what nobody asked to leave out says so, with the count and the reason."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_models import MODEL_TYPES, tiny_config, tiny_model
from torch import nn
from transformers import BertLMHeadModel, BertModel, EncoderDecoderModel

import hf_stable
from hf_stable.methods.patching import configs_by_part


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


# A part that was patched before the whole, and the whole before a part


def encoder_decoder() -> EncoderDecoderModel:
    decoder = tiny_config("bert", is_decoder=True, add_cross_attention=True)
    return EncoderDecoderModel(
        encoder=BertModel(tiny_config("bert")), decoder=BertLMHeadModel(decoder)
    )


def num_patched(model: nn.Module) -> int:
    return hf_stable.describe(model).num_patched


def test_the_whole_is_patched_after_a_part(tmp_path):
    whole = num_patched(hf_stable.patch(encoder_decoder(), "sigma_reparam"))
    model = encoder_decoder()
    hf_stable.patch(model.encoder, "sigma_reparam")
    gamma = model.encoder.encoder.layer[0].attention.self.query.gamma
    gamma.data.mul_(2)
    part = num_patched(model)
    assert 0 < part < whole
    assert not warnings_of(model)
    assert num_patched(model) == whole
    assert model.encoder.encoder.layer[0].attention.self.query.gamma is gamma
    assert list(configs_by_part(model)) == [""]
    model.save_pretrained(tmp_path)
    again = hf_stable.load(type(model), tmp_path)
    assert num_patched(again) == whole
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_what_became_plain_since_is_patched_again():
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    hf_stable.fold(model.transformer.h[0])
    assert num_patched(model) == 4
    assert "put in since: patch again to take it" in str(hf_stable.describe(model))
    hf_stable.patch(model, "sigma_reparam")
    assert num_patched(model) == 8


def test_a_part_in_another_way_is_refused_and_named():
    model = encoder_decoder()
    hf_stable.patch(model.decoder, "sigma_reparam", init="one")
    before = num_patched(model)
    with pytest.raises(ValueError, match=r"'decoder' of the model is patched already, with .*one"):
        hf_stable.patch(model, "sigma_reparam")
    assert num_patched(model) == before


def test_layers_of_another_patched_model_go_on_and_that_is_said():
    teacher, student = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam"), tiny_model("gpt2")
    student.transformer.h[0] = copy.deepcopy(teacher.transformer.h[1])
    with pytest.warns(UserWarning, match=r"^4 layers \(first: 'transformer\.h\.0\.attn\.c_attn'\)"):
        hf_stable.patch(student, "sigma_reparam", init="one")
    gammas = [student.transformer.h[n].mlp.c_fc.gamma.item() for n in (0, 1)]
    assert gammas[0] == teacher.transformer.h[1].mlp.c_fc.gamma.item() != 1 == gammas[1]
    with pytest.raises(ValueError, match=r"power_iterations=1 and 3 gamma; .*power_iterations=2"):
        hf_stable.patch(teacher.transformer, "sigma_reparam", power_iterations=2)

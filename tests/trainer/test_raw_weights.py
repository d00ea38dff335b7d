"""Raw weights of a patched model never pass for those of a plain one."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_models import tiny_model
from tiny_training import same_state
from torch import nn
from torch.optim.swa_utils import AveragedModel
from trained_models import logits_of, trained

import hf_stable
from hf_stable.checkpoints.state_dicts import fold_state_dict

REFUSED = r"raw weights of a patched model .*hf_stable\.patch on the model before"


def test_a_state_dict_is_refused_by_from_pretrained(model_type):
    model = trained(model_type, init="one")
    with pytest.raises(ValueError, match=REFUSED):
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    plain, _ = fold_state_dict(model, model.state_dict())
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=plain).eval()
    # Folding rounds each weight once (6e-8): logits of order 1 move by some ten of that.
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-6, atol=1e-6)
    raw = {name: weight for name, weight in model.state_dict().items() if name in plain}
    other = type(model).from_pretrained(None, config=model.config, state_dict=raw).eval()
    assert not torch.allclose(logits_of(other), logits_of(model), rtol=1e-3)  # what is refused


@pytest.mark.parametrize("auto", [False, True], ids=["class", "auto class"])
def test_a_folder_of_raw_weights_is_refused(auto, tmp_path):
    model = trained("vit")
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model_class = transformers.AutoModelForImageClassification if auto else type(model)
    with pytest.raises(ValueError, match=REFUSED):
        model_class.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert not hf_stable.is_patched(model_class.from_pretrained(tmp_path))


@pytest.mark.parametrize("strict", [True, False])
def test_a_plain_model_does_not_take_them(strict, model_type):
    model, plain = trained(model_type), tiny_model(model_type)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with pytest.raises(ValueError, match=REFUSED):
        plain.load_state_dict(model.state_dict(), strict=strict)
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())
    hf_stable.patch(plain, "sigma_reparam")
    plain.load_state_dict(model.state_dict(), strict=strict)
    assert same_state(plain, model)


class Holder(nn.Module):
    """A module of a user's own around a model, as training loops have them."""

    def __init__(self, model):
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones(1))


def test_nor_does_a_part_of_one_or_a_module_that_holds_one():
    model, plain = trained("vit"), tiny_model("vit")
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    block, raw_block = plain.vit.layers[0], model.vit.layers[0].state_dict()
    averaged, raw_average = AveragedModel(plain), AveragedModel(model).state_dict()
    for target, raw in (
        (block, raw_block),
        (block.mlp.fc1, model.vit.layers[0].mlp.fc1.state_dict()),
        (Holder(plain), Holder(model).state_dict()),
        (averaged, raw_average),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            target.load_state_dict(raw, strict=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())
    hf_stable.patch(plain, "sigma_reparam")
    block.load_state_dict(raw_block)
    Holder(plain).load_state_dict(Holder(model).state_dict())
    assert same_state(plain, model)


def test_raw_weights_of_layers_that_are_not_there_are_left_out_as_ever():
    both = {f"other.{name}": tensor for name, tensor in trained("vit").state_dict().items()}
    holder = Holder(nn.Linear(2, 2))
    left = holder.load_state_dict({**both, "scale": torch.full((1,), 3.0)}, strict=False)
    assert holder.scale == 3 and set(left.unexpected_keys) == set(both)


def test_plain_weights_go_where_they_went(model_type, tmp_path):
    plain, other = tiny_model(model_type), tiny_model(model_type, seed=3)
    assert not same_state(plain, other)
    other.load_state_dict(plain.state_dict())
    assert same_state(plain, other)
    plain.save_pretrained(tmp_path)
    assert same_state(type(plain).from_pretrained(str(tmp_path)), plain)

"""Models in which something holds the forward of each layer: accelerate's hooks, and others."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from tiny_models import sgd_steps, tiny_batch, tiny_model
from torch import nn

import hf_stable
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.method import sigma_layers

# Two names for one device: accelerate hooks every layer as it does over two GPUs.
CPUS = torch.device("cpu"), torch.device("cpu:0")
MAPS = {
    "gpt2": {"transformer": CPUS[0], "lm_head": CPUS[1]},
    "vit": {"vit": CPUS[0], "classifier": CPUS[1]},
}


def untied(model_type: str) -> nn.Module:
    """accelerate cannot tie weights again over two names of one device."""
    options = {"tie_word_embeddings": False} if model_type == "gpt2" else {}
    return tiny_model(model_type, **options)


def spread(model: nn.Module) -> nn.Module:
    """The model as `from_pretrained(device_map=...)` leaves it over two devices."""
    model = dispatch_model(model, MAPS[model.config.model_type], force_hooks=True)
    assert all(
        "forward" in m.__dict__ for m in model.modules() if isinstance(m, nn.Linear | SigmaLayer)
    )
    return model.requires_grad_(True)  # accelerate freezes what it moves to "cpu:0"


def one_by_one(model: nn.Module) -> nn.Module:
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    return model


def hooked_and_freed(model: nn.Module) -> nn.Module:
    """accelerate leaves a `forward` behind where its hooks are taken off."""
    remove_hook_from_module(one_by_one(model), recurse=True)
    assert any("forward" in module.__dict__ for module in model.modules())
    return model


WAYS = {"dispatch_model": spread, "hooks": one_by_one, "hooks taken off": hooked_and_freed}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_batch(model)).logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", MAPS)
def test_a_hooked_model_trains_saves_and_folds_as_one_without(model_type, way, tmp_path):
    model = hf_stable.patch(untied(model_type), "sigma_reparam", init="one")
    hooked = hf_stable.patch(WAYS[way](untied(model_type)), "sigma_reparam", init="one")
    start = [layer.gamma.detach().clone() for _, layer in sigma_layers(hooked)]
    assert sgd_steps(hooked) == sgd_steps(model)
    for before, (name, layer), (_, other) in zip(
        start, sigma_layers(hooked), sigma_layers(model), strict=True
    ):
        assert torch.equal(layer.gamma, other.gamma) and torch.equal(layer.sigma, other.sigma), name
        assert not torch.equal(layer.gamma, before), name
    torch.testing.assert_close(logits(hooked), logits(model), rtol=0, atol=0)
    hooked.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model))
    twin = copy.deepcopy(hooked)
    raw = [layer.weight.detach().clone() for _, layer in sigma_layers(hooked)]
    places = [layer for _, layer in sigma_layers(hooked)]
    hf_stable.fold(hooked)
    torch.testing.assert_close(logits(hooked), logits(model))
    assert not any(torch.equal(w, layer.weight) for w, layer in zip(raw, places, strict=True))
    torch.testing.assert_close(logits(twin), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("model_type", MAPS)
def test_hooks_may_come_and_go_after_the_patch(model_type):
    model = hf_stable.patch(untied(model_type), "sigma_reparam", init="one")
    sgd_steps(model)
    expected = logits(model)
    spread(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    hf_stable.fold(model)
    torch.testing.assert_close(logits(model), expected)
    assert not sigma_layers(model)


def test_a_patched_folder_is_loaded_over_two_devices(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam", init="one")
    sgd_steps(model)
    model.save_pretrained(tmp_path)
    loaded = hf_stable.load(type(model), tmp_path, device_map=MAPS["vit"])
    assert any(hasattr(module, "_hf_hook") for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    sgd_steps(loaded.requires_grad_(True))
    sgd_steps(model)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("hooks_stay", [True, False])
def test_a_failing_patch_leaves_the_hooks_as_they_were(hooks_stay):
    model = one_by_one(tiny_model("gpt2"))
    if not hooks_stay:
        remove_hook_from_module(model, recurse=True)
    layer = model.transformer.h[1].mlp.c_fc
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    held = dict(layer.__dict__)
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc.*NaN"):
        hf_stable.patch(model, "sigma_reparam")
    assert layer.__dict__ == held and not sigma_layers(model)


# What cannot be followed is refused before anything changes.


def replaced(model: nn.Module) -> nn.Module:
    layer = model.transformer.h[0].attn.c_proj
    inner = layer.forward
    layer.forward = functools.wraps(inner)(lambda x: inner(x) * 2)
    return model


def replaced_below_a_hook(model: nn.Module) -> nn.Module:
    add_hook_to_module(replaced(model).transformer.h[0].attn.c_proj, ModelHook())
    return model


@pytest.mark.parametrize("change", [replaced, replaced_below_a_hook])
def test_a_forward_of_somebody_else_is_refused(change):
    model = change(tiny_model("gpt2"))
    expected, keys = logits(model), model.state_dict().keys()
    with pytest.raises(
        UnsupportedModelError, match=r"replaced the forward of 'transformer\.h\.0\.attn\.c_proj'"
    ):
        hf_stable.patch(model, "sigma_reparam")
    assert model.state_dict().keys() == keys and not sigma_layers(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    hf_stable.patch(model, "sigma_reparam", exclude=["*h.0.attn.c_proj"])
    torch.testing.assert_close(logits(model), expected)


def test_offloaded_weights_are_refused():
    model = tiny_model("gpt2")
    expected = logits(model)
    cpu_offload(model, execution_device=CPUS[0])
    with pytest.raises(UnsupportedModelError, match="meta device.*offload"):
        hf_stable.patch(model, "sigma_reparam")
    assert not sigma_layers(model)
    torch.testing.assert_close(logits(model), expected)


def test_a_patched_model_runs_offloaded_and_comes_back(tmp_path):
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam", init="one")
    sgd_steps(model)
    expected = logits(model)
    cpu_offload(model, execution_device=CPUS[0])
    assert all(layer.weight.is_meta for _, layer in sigma_layers(model))
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected)
    for change in (hf_stable.fold, hf_stable.refresh):
        with pytest.raises(UnsupportedModelError, match=r"attn\.c_attn' is offloaded"):
            change(model)
    with pytest.raises(UnsupportedModelError, match="is offloaded"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    torch.testing.assert_close(logits(model), expected)
    remove_hook_from_module(model, recurse=True)
    hf_stable.fold(model)
    torch.testing.assert_close(logits(model), expected)


def test_a_patched_folder_is_not_loaded_offloaded(tmp_path):
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedModelError, match="without offloading"):
        hf_stable.load(
            type(model),
            tmp_path / "saved",
            device_map={"": "disk"},
            offload_folder=tmp_path / "off",
        )

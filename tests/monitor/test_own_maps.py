"""Attention past the interface of transformers, and layers that run more than once."""

from __future__ import annotations

import warnings

import pytest
import torch
from attention_references import attention_maps
from tiny_architectures import batch, build, outputs_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

import hf_stable

RETURNING = ("bloom", "falcon", "gpt_neo", "deberta-v2", "swinv2")
# The same float32 numbers in another order: each of up to 16 keys of a row rounds once.
ROUNDING = dict.fromkeys(("rtol", "atol"), 16 * torch.finfo(torch.float32).eps)
TEXTS = ("bloom", "falcon", "gpt_neo", "deberta-v2")


def own_maps(name, **inputs):
    """The maps that each attention itself returns, call by call."""
    model = build(name, attn_implementation="eager")
    return attention_maps(model, batch(name) | inputs)


def padding(name):
    """Three tokens on the left: their rows see no key, being causal, or hidden as a row as well."""
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    return {"attention_mask": mask} if name in TEXTS else {}


def ran(model, inputs):
    """The output and every gradient of a step with dropout, and the state of random numbers."""
    model.train().zero_grad()
    output = outputs_of(model, inputs)
    output.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [output.detach(), *gradients, torch.get_rng_state()]


@pytest.mark.parametrize("name", RETURNING)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_entropy_is_that_of_the_maps_which_the_model_returns(name, padded):
    inputs = padding(name) if padded else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with hf_stable.probe(build(name), terms="all", maps="all") as records, torch.no_grad():
            outputs_of(build(name), batch(name))  # another model is not recorded
            assert not records.entropy
        with hf_stable.probe(model := build(name), terms="all", maps="all") as records:
            outputs_of(model, batch(name) | inputs)
    maps = own_maps(name, **inputs)
    assert list(records.entropy) == list(maps) and not records.missing
    blind = 1 - inputs.get("attention_mask", torch.ones(1, 1))[:, None, :, None]
    for layer, (own,) in maps.items():
        own = own.masked_fill(blind.bool(), torch.nan)
        exact = torch.special.entr(own).sum(-1)
        torch.testing.assert_close(records.entropy[layer], exact.nanmean((0, 2)), **ROUNDING)
        share = records.entropy_normalised[layer]
        assert ((share > 0) & (share <= 1)).all()
        # Short sequences are kept whole.
        torch.testing.assert_close(records.maps[layer], own[0], **ROUNDING, equal_nan=True)
        assert len(records.mode[layer]) == len(records.rank[layer]) == own.shape[1]
    assert not records.entropy_bound  # it does not hold for any of them


@pytest.mark.parametrize("name", RETURNING)
def test_the_run_does_not_notice(name):
    quiet = ran(build(name), batch(name))
    model = build(name)
    with hf_stable.probe(model, terms="all") as records:
        watched = ran(model, batch(name))
    assert records.entropy
    assert all(torch.equal(a, b) for a, b in zip(quiet, watched, strict=True))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["bloom", "falcon", "gpt_neo"])
def test_the_prompt_of_a_generation_is_measured_and_its_steps_are_not(name):
    model, ids = build(name), batch(name)["input_ids"]
    with hf_stable.probe(model, terms=["entropy"]) as prompt, torch.no_grad():
        outputs_of(model, {"input_ids": ids})
    with hf_stable.probe(model, terms=["entropy"]) as records:
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > ids.shape[1] + 1
    for layer, entropy in prompt.entropy.items():
        torch.testing.assert_close(records.entropy[layer], entropy, **ROUNDING)


def test_the_maps_of_wavlm_are_means_over_heads_so_they_are_not_measured():
    model = build("wavlm")
    with pytest.warns(UserWarning, match="are left out"), hf_stable.probe(model) as records:
        outputs_of(model, batch("wavlm"))
    assert not records.entropy and records.sigma_qk
    maps = [each for calls in own_maps("wavlm").values() for each in calls]
    assert all(torch.equal(each[:, 0], each[:, 1]) for each in maps)


def test_a_shared_layer_has_a_row_for_each_call():
    model, layer = build("albert"), "albert.encoder.albert_layer_groups.0.albert_layers.0"
    calls = [f"{layer}@1", f"{layer}@2"]
    with hf_stable.probe(model, terms="all") as records:
        for _ in range(2):  # micro-batches are averaged, as of every layer
            outputs_of(model, batch("albert")).square().mean().backward()
    maps = own_maps("albert")[layer]
    for call, own in zip(calls, maps, strict=True):
        exact = torch.special.entr(own).sum(-1).mean((0, 2))
        torch.testing.assert_close(records.entropy[call], exact, **ROUNDING)
        assert (records.entropy_bound[call] <= exact + ROUNDING["atol"]).all()
    assert not torch.allclose(*(records.entropy[call] for call in calls), rtol=1e-4)
    for term in ("entropy", "rank", "mode", "norm_x", "norm_dx", "nonfinite_dx"):
        assert list(getattr(records, term)) == calls, term
    assert list(records.sigma_qk) == [layer]  # its weights are the same in each
    assert records.norm_dx[calls[0]] != records.norm_dx[calls[1]]


@pytest.mark.parametrize("way", list(CheckpointImpl), ids=str)
def test_checkpointing_keeps_the_calls_apart(way):
    def norms(model):
        with hf_stable.probe(model, terms=["norm_x", "norm_dx"]) as records:
            outputs_of(model, batch("albert")).square().mean().backward()
        return records

    model = build("albert").train()
    plain = norms(model)
    layers = model.albert.encoder.albert_layer_groups[0].albert_layers
    layers[0] = checkpoint_wrapper(layers[0], checkpoint_impl=way)
    recomputed = norms(model)
    for term in ("norm_x", "norm_dx"):
        mine, its = getattr(plain, term), getattr(recomputed, term)
        assert list(mine) == list(its) and len(mine) == 2
        for call, value in mine.items():
            assert torch.equal(its[call], value)  # a layer that runs again computes the same

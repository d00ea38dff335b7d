"""Models that ZeRO-3 partitions as they are loaded: patched, trained, saved and continued alike.

With the Trainer that is the usual way: `TrainingArguments` comes before `from_pretrained`.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from deepspeed_runs import (
    ROUNDING,
    STEPS,
    UNDER_ADAMW2,
    adamw2_of,
    digest,
    largest_error,
    losses_of,
    make_model,
    same_on_ranks,
    settings,
    told_accelerator,  # noqa: F401  (a fixture for all tests here)
    train,
    whole,
)
from faults import check_told, told_where_memory_ends
from gloo_ranks import run_ranks
from tiny_models import tiny_batch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import hf_stable
from hf_stable.checkpoints.sidecar import read_state
from hf_stable.methods.sigma_reparam.method import sigma_layers

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deepspeed")]

NAMES = {"gpt2": "GPT-2", "llama": "Llama", "mixtral": "Mixtral"}
HALF = STEPS // 2


def load_partitioned(folder, name, precision="fp32", *, load=None, **options):
    """Load a model as a training script does that makes its arguments first."""
    config = settings(precision, stage=3)
    with_bf16 = {"bf16": precision == "bf16"}
    arguments = TrainingArguments(
        str(folder / "arguments"), use_cpu=True, deepspeed=config, **with_bf16
    )
    model_class = type(make_model(name))  # not loaded, and so not partitioned by the arguments
    load = load or model_class.from_pretrained
    model = load(folder, **options)
    del arguments
    gammas = [layer.gamma for _, layer in sigma_layers(model)]  # the engine takes them
    assert all(not p.numel() for p in model.parameters() if all(p is not g for g in gammas))
    return model


def on_ranks(folder):
    """Every run of this file, one after the other on the same two processes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found: dict = {"parity": {}}
    for name in NAMES:
        found["parity"][name] = trained(folder, name)
    found["kept"] = trained(folder, "gpt2", stage3_param_persistence_threshold=100000)
    found["bf16"] = continued_in_bfloat16(folder)
    found["folded"] = folded(folder)
    found["undone"] = undone(folder)
    found["failed"] = failed(folder)
    found["unsaved"] = unsaved(folder)
    return found


def trained(folder, name, **zero):
    world = dist.get_world_size()
    model = load_partitioned(folder / name, name)
    case = f"{name}-kept" if zero else name
    trainer = train(
        name, folder / f"{case}-trained", world, model, save_strategy="steps", save_steps=STEPS,
        deepspeed=settings(stage=3, **zero), **UNDER_ADAMW2,
    )  # fmt: skip
    return {
        "losses": losses_of(trainer),
        "rates": adamw2_of(trainer).effective_lr(),
        "same": same_on_ranks(trainer.model),
        "error": largest_error(trainer.model),
    }


def load_patched(path, **given):
    return hf_stable.load(type(make_model("gpt2")), path, **given)


def continued_in_bfloat16(folder):
    """Steps with float32 masters under dropout; half of them again, loaded as it is patched."""
    world = dist.get_world_size()
    options = dict(deepspeed=settings("bf16", stage=3), bf16=True, **UNDER_ADAMW2)
    model = load_partitioned(folder / "dropout", "gpt2", "bf16")
    first = train(
        "gpt2", folder / "whole", world, model, save_strategy="steps", save_steps=HALF, **options
    )
    checkpoint = folder / "whole" / f"checkpoint-{HALF}"
    unset_hf_deepspeed_config()
    model = load_partitioned(checkpoint, "gpt2", "bf16", load=load_patched)
    again = train("gpt2", folder / "again", world, model, resume=str(checkpoint), **options)
    return {
        "dtypes": sorted({str(p.dtype) for p in first.model.parameters()}),
        "whole": losses_of(first),
        "again": losses_of(again),
        "same": same_on_ranks(first.model),
        "state": digest(first.model) == digest(again.model),
        "error": largest_error(first.model),
    }


def folded(folder):
    """A weight before and after a fold that changes it, and what is left of the patch."""
    unset_hf_deepspeed_config()
    model = load_partitioned(folder / "gpt2", "gpt2")
    hf_stable.patch(model, "sigma_reparam", init="one")
    described = str(hf_stable.describe(model))
    hf_stable.fold(model)
    partitioned = all(not param.numel() for param in model.parameters())
    return {"weights": weights_of(model), "described": described, "partitioned": partitioned}


def undone(folder):
    """What a patch that cannot be made says, and what it leaves."""
    unset_hf_deepspeed_config()
    model = load_partitioned(folder / "zeros", "gpt2")
    with pytest.raises(ValueError) as error:
        hf_stable.patch(model, "sigma_reparam")
    return {"told": str(error.value), "patched": hf_stable.is_patched(model)}


ROOM = "hf_stable.methods.sigma_reparam"
FOLD_FAULTS = {
    f"{ROOM}.triples.sigma_of": 3,
    f"{ROOM}.folding._local_effective_weight": 3,
    f"{ROOM}.folding.forget": 3,
    "hf_stable.methods.patching.take_out_configs": 1,
}
"""Functions that fail in a fold, at which call of them."""

PATCH_FAULT, LOAD_FAULT = (
    (f"{ROOM}.swapping.leading_triple", 3),
    ("hf_stable.checkpoints.saved_state.SavedState.check_folds_to", 3),
)


def failed(folder):
    """What every rank is told where one runs out of memory, and what it leaves of the model."""
    unset_hf_deepspeed_config()
    model = load_partitioned(folder / "gpt2", "gpt2")
    told = {
        PATCH_FAULT[0]: told_where_memory_ends(
            *PATCH_FAULT, 1, lambda: hf_stable.patch(model, "sigma_reparam")
        )
    }
    touched = hf_stable.is_patched(model)
    hf_stable.patch(model, "sigma_reparam", init="one")
    before, gammas = weights_of(model), digest(model)
    for path, at in FOLD_FAULTS.items():
        told[path] = told_where_memory_ends(path, at, 1, lambda: hf_stable.fold(model))
        after = weights_of(model)
        touched |= any(not torch.equal(before[key], after[key]) for key in before | after)
        touched |= digest(model) != gammas or len(sigma_layers(model)) != 8
    hf_stable.fold(model)
    checkpoint = folder / "whole" / f"checkpoint-{HALF}"
    unset_hf_deepspeed_config()
    told[LOAD_FAULT[0]] = told_where_memory_ends(
        *LOAD_FAULT, 1, lambda: load_partitioned(checkpoint, "gpt2", "bf16", load=load_patched)
    )
    return {"told": told, "touched": touched, "weights": weights_of(model)}


def weights_of(model):
    with whole(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def unsaved(folder):
    """What is said where a partitioned model is saved as if it were whole."""
    unset_hf_deepspeed_config()
    model = load_partitioned(folder / "gpt2", "gpt2")
    hf_stable.patch(model, "sigma_reparam")
    with pytest.raises(hf_stable.UnsupportedModelError) as error:
        model.save_pretrained(folder / "unsaved")
    return str(error.value)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("partitioned")
    for name in NAMES:
        make_model(name).save_pretrained(folder / name)
    make_model("gpt2", dropout=True).save_pretrained(folder / "dropout")
    zeros = make_model("gpt2")
    torch.nn.init.zeros_(zeros.transformer.h[1].mlp.c_fc.weight)
    zeros.save_pretrained(folder / "zeros")
    results = run_ranks(on_ranks, 2, folder)
    return results[0], folder, results[1]


@pytest.fixture(scope="module")
def alone(ran):
    found = {}
    for name in NAMES:
        model = type(make_model(name)).from_pretrained(ran[1] / name)
        trainer = train(name, ran[1] / f"{name}-alone", model=model, **UNDER_ADAMW2)
        found[name] = losses_of(trainer), adamw2_of(trainer).effective_lr()
    return found


def check_as_alone(found, alone):
    losses, rates = alone
    assert found["same"]
    assert found["error"] < ROUNDING
    assert list(found["losses"]) == list(losses) == list(range(1, STEPS + 1))
    for step, loss in losses.items():
        assert found["losses"][step] == pytest.approx(loss, rel=ROUNDING)
    assert found["rates"].keys() == rates.keys()
    for name, rate in rates.items():
        assert found["rates"][name] == pytest.approx(rate, rel=10 * ROUNDING), name
    assert max(losses.values()) - min(losses.values()) > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.parity(
                engine="DeepSpeed ZeRO 3, partitioned at loading", models=(shown,),
                method="sigmaReparam and AdamW2", same=("losses", "checkpoints"),
            ),
        )
        for name, shown in NAMES.items()
    ],
)  # fmt: skip
def test_it_trains_as_in_one_process_and_leaves_a_plain_folder(name, ran, alone):
    check_as_alone(ran[0]["parity"][name], alone[name])
    folder = ran[1] / f"{name}-trained" / f"checkpoint-{STEPS}"
    model_class = type(make_model(name))
    plain = model_class.from_pretrained(folder).eval()
    patched = hf_stable.load(model_class, folder).eval()
    assert len(sigma_layers(patched)) > 7
    batch = {k: v for k, v in tiny_batch(plain).items() if k != "labels"}
    start = model_class.from_pretrained(ran[1] / name).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            plain(**batch).logits, patched(**batch).logits, rtol=ROUNDING, atol=ROUNDING
        )
        assert not torch.allclose(plain(**batch).logits, start(**batch).logits, atol=1e-3)


def test_parameters_that_deepspeed_keeps_whole_train_alike(ran, alone):
    check_as_alone(ran[0]["kept"], alone["gpt2"])


@pytest.mark.parity(
    engine="DeepSpeed ZeRO 3, partitioned at loading", models=("GPT-2",),
    method="sigmaReparam and AdamW2", same=("resume",),
)  # fmt: skip
def test_a_patched_model_that_is_loaded_partitioned_resumes_exactly(ran):
    found = ran[0]["bf16"]
    assert found["dtypes"] == ["torch.bfloat16"]
    assert found["same"] and found["state"] and found["error"] < ROUNDING
    half = {step: loss for step, loss in found["whole"].items() if step > HALF}
    assert {step: found["again"][step] for step in half} == half and len(half) == HALF
    raw = read_state(ran[1] / "whole" / f"checkpoint-{STEPS}").tensors
    weight = raw["transformer.h.0.attn.c_attn.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())  # masters, not roundings


def test_it_is_described_and_folded_in_place(ran):
    found, _, other = ran
    model = type(make_model("gpt2")).from_pretrained(ran[1] / "gpt2")
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    hf_stable.patch(model, "sigma_reparam", init="one")
    assert found["folded"]["described"] == str(hf_stable.describe(model))
    hf_stable.fold(model)
    assert found["folded"]["partitioned"]
    expected = dict(model.named_parameters())
    assert found["folded"]["weights"].keys() == expected.keys()
    for name, weight in found["folded"]["weights"].items():
        # gamma over sigma, and the weight times that, are rounded once each (6e-8); sigma is a norm
        # whose sums may be in another order.
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-6, atol=0)
        assert torch.equal(weight, other["folded"]["weights"][name])
    assert sum(not torch.equal(before[name], expected[name]) for name in before) == 8


def test_what_fails_on_one_rank_is_said_on_both_and_changes_nothing(ran):
    both = [ran[0]["failed"], ran[2]["failed"]]
    for path in (PATCH_FAULT[0], *FOLD_FAULTS, LOAD_FAULT[0]):
        check_told([found["told"][path] for found in both], path, 1)
    for found in both:
        assert not found["touched"]
        for name, weight in found["weights"].items():
            assert torch.equal(weight, ran[0]["folded"]["weights"][name]), name


def test_what_cannot_work_is_said_on_every_rank(ran):
    for rank in (ran[0], ran[2]):
        assert "all-zero part" in rank["undone"]["told"] and "(16, 64)" in rank["undone"]["told"]
        assert not rank["undone"]["patched"]
        assert "DeepSpeed ZeRO-3 has partitioned the weights" in rank["unsaved"]

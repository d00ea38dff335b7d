"""Experts that are one parameter: each reparametrised by itself, saved, folded and resumed."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_architectures import batch, build, outputs_of
from tiny_training import Interrupt, losses, same_state
from transformers import Trainer, TrainingArguments

import hf_stable
from hf_stable.checkpoints.folding import fold_checkpoint
from hf_stable.commands.inspect.inspection import inspect_checkpoint
from hf_stable.measures.matrices import local_matrices
from hf_stable.methods.sigma_reparam.stacks import SigmaStack, put_stack
from hf_stable.methods.sigma_reparam.steps import live_layers
from hf_stable.methods.undoing import keep_attributes, undoing

NAMES = ("mixtral", "qwen3_moe")
# Each weight is rounded once more, and each sum over it differs by that: some ten roundings (6e-8
# each) on the way to an output, the largest of which are near 1.
ROUNDING = dict(rtol=1e-5, atol=1e-6)
# A norm in float32 of sums of at most 64 products, each rounded by half a unit (6e-8).
SPECTRAL = dict(rtol=1e-5, atol=0)
FOUR_EXPERTS = {"gate_up_proj": 8, "down_proj": 4}  # parts: gate and up of each, and each


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def stacks(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SigmaStack)}


def exact_sigmas(layer):
    matrices = local_matrices(layer.weight.detach().double(), layer.parts)
    return torch.stack([torch.linalg.matrix_norm(matrix, 2) for matrix in matrices])


def held_sigmas(layer):
    """`u.T W v` of each part, by the vectors that the layer has."""
    matrices = local_matrices(layer.weight.detach().double(), layer.parts)
    sides = zip(layer.sigma_u.double(), layer.sigma_v.double(), strict=True)
    return torch.stack([
        u[: len(matrix)] @ matrix @ v[: matrix.shape[1]]
        for matrix, (u, v) in zip(matrices, sides, strict=True)
    ])  # fmt: skip


@torch.no_grad()
def output(model, name):
    return outputs_of(model.eval(), batch(name))


def trained(name, steps=3, **options):
    model = hf_stable.patch(build(name).train(), "sigma_reparam", **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs_of(model, batch(name)).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_every_expert_has_its_own_sigma_which_follows_its_weight(name):
    plain = build(name)
    expected = output(plain, name)
    model = hf_stable.patch(plain, "sigma_reparam")
    assert torch.equal(output(model, name), expected)
    found = stacks(model)
    assert len(found) == 2 * (name == "mixtral") + 2
    for path, layer in found.items():
        assert layer.num_parts == FOUR_EXPERTS[path.rpartition(".")[2]]
        torch.testing.assert_close(layer.sigma.double(), exact_sigmas(layer), **SPECTRAL)
    before = {path: layer.sigma.clone() for path, layer in found.items()}

    model = trained(name)
    for path, layer in stacks(model).items():
        assert not torch.isclose(layer.sigma, before[path], rtol=1e-3).any()
        assert not torch.isclose(layer.gamma, before[path], rtol=1e-4).all()
        torch.testing.assert_close(layer.sigma.double(), held_sigmas(layer), **SPECTRAL)
        # One iteration a step lags behind a weight that turns.
        torch.testing.assert_close(layer.sigma.double(), exact_sigmas(layer), rtol=0.2, atol=0)
    assert not torch.allclose(output(model, name), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_compute_experts_takes_the_effective_weights(implementation):
    model = trained("mixtral", init="one")
    model.set_experts_implementation(implementation)
    found = output(model, "mixtral")
    raw = output(build("mixtral"), "mixtral")
    assert not torch.allclose(found, raw, rtol=1e-2, atol=1e-2)
    plain = hf_stable.fold(copy.deepcopy(model))
    torch.testing.assert_close(output(plain, "mixtral"), found, **ROUNDING)


def test_gate_and_up_have_one_sigma_for_each_expert_when_joint():
    model = hf_stable.patch(build("mixtral"), "sigma_reparam", fused_qkv="joint")
    for layer in stacks(model).values():
        assert layer.num_parts == 4
        torch.testing.assert_close(layer.sigma.double(), exact_sigmas(layer), **SPECTRAL)


def test_the_gradient_is_that_of_the_written_out_product():
    model = trained("mixtral", init="one")
    layer = next(iter(stacks(model).values()))
    weight, gamma = (t.detach().double().requires_grad_() for t in (layer.weight, layer.gamma))
    direction = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    layer.zero_grad()
    (layer.effective_weight() * direction).sum().backward()
    written = []
    for index, matrix in enumerate(local_matrices(weight, layer.parts)):
        u, v = layer.sigma_u[index], layer.sigma_v[index]
        u, v = (side[:n].double() for side, n in zip((u, v), matrix.shape, strict=True))
        written.append(gamma[index] / (u @ matrix @ v) * matrix)
    whole = torch.cat(written).view_as(weight)
    (whole * direction).sum().backward()
    # In float32: each has a sum over the 16 x 24 entries of a part, and a half unit for each; terms
    # of that sum are near one, and may cancel.
    rounding = dict(rtol=16 * 24 * 2**-24, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, **rounding)
    torch.testing.assert_close(layer.gamma.grad.double(), gamma.grad, **rounding)


def test_saved_as_every_expert_apart_and_loaded_exactly(name, tmp_path):
    model = trained(name)
    answer = output(model, name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert any(".experts.3." in key for key in keys) and not any("sigma" in key for key in keys)
    stock, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(output(stock, name), answer, **ROUNDING)
    again = hf_stable.load(type(model), tmp_path)
    assert torch.equal(output(again, name), answer) and same_state(again, model)
    # An optimizer's state knows parameters by their order.
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert hf_stable.describe(again) == hf_stable.describe(model)


def test_folding_brings_the_parameters_back_in_their_places(name, tmp_path):
    plain = build(name)
    model = trained(name)
    answer, weights = output(model, name), {id(s.weight) for s in stacks(model).values()}
    hf_stable.export(model, tmp_path)
    torch.testing.assert_close(
        output(type(plain).from_pretrained(tmp_path), name), answer, **ROUNDING
    )
    assert stacks(model)  # the export has left it as it is
    hf_stable.fold(model)
    torch.testing.assert_close(output(model, name), answer, **ROUNDING)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}
    assert weights <= {id(p) for p in model.parameters()}
    assert not weights & {id(layer.weight) for layer in live_layers()}


def test_a_plain_state_dict_makes_the_patched_model_the_plain_one():
    plain, model = build("mixtral"), trained("mixtral")
    expected = output(plain, "mixtral")
    assert not torch.allclose(output(model, "mixtral"), expected, rtol=1e-3, atol=1e-4)
    model.load_state_dict(plain.state_dict())
    # gamma is sigma, and a product with 1 is not rounded.
    torch.testing.assert_close(output(model, "mixtral"), expected, rtol=0, atol=0)
    for layer in stacks(model).values():
        torch.testing.assert_close(layer.gamma, layer.sigma, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_refreshed_on_its_own(way):
    model = trained("mixtral")
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(output(other, "mixtral"), output(model, "mixtral"))
    mine, its = (next(iter(stacks(m).values())) for m in (model, other))
    assert its.holder is other.model.layers[0].mlp.experts and its.holder is not mine.holder
    before = mine.sigma.clone()
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    outputs_of(other, batch("mixtral")).square().mean().backward()
    optimizer.step()
    assert torch.equal(mine.sigma, before) and not torch.equal(its.sigma, before)


def test_a_change_by_data_of_one_expert_is_seen_in_evaluation():
    model = trained("mixtral")
    layer = next(iter(stacks(model).values()))
    output(model, "mixtral")
    layer.weight.data[2].mul_(2)
    output(model, "mixtral")
    torch.testing.assert_close(layer.sigma.double(), exact_sigmas(layer), **SPECTRAL)


def test_a_failure_leaves_the_parameters_where_they_were():
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    names = [n for n, _ in model.named_parameters()]
    with torch.no_grad():
        experts.down_proj[1].zero_()
    with pytest.raises(ValueError, match=r"experts\.down_proj.*all-zero part"):
        hf_stable.patch(model, "sigma_reparam")
    assert [n for n, _ in model.named_parameters()] == names

    plain_class = type(experts)
    with pytest.raises(KeyError), undoing() as undo:
        undo.append(keep_attributes(experts))
        put_stack(experts, "gate_up_proj", undo)
        assert type(experts) is not plain_class
        raise KeyError
    assert type(experts) is plain_class and [n for n, _ in model.named_parameters()] == names


def test_folded_on_disk_and_inspected_expert_by_expert(tmp_path):
    model = trained("mixtral")
    answer = output(model, "mixtral")
    model.save_pretrained(tmp_path / "saved")
    report = inspect_checkpoint(tmp_path / "saved")
    assert report.problem is None
    rows = {row.name: row for row in report.layers if "experts" in row.name}
    layer = model.model.layers[1].mlp.experts.gate_up_proj
    effective = layer.gamma.double() / layer.sigma.double() * exact_sigmas(layer)
    for expert in range(4):
        for offset, part in enumerate(("w1", "w3")):
            row = rows[f"model.layers.1.block_sparse_moe.experts.{expert}.{part}"]
            own = 2 * expert + offset
            assert row.gamma == (layer.gamma[own].item(),)
            assert row.sigma[0] == pytest.approx(effective[own].item(), rel=SPECTRAL["rtol"])
    fold_checkpoint(tmp_path / "saved", tmp_path / "folded")

    raw = tmp_path / "raw"
    model.config.save_pretrained(raw)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, raw / "model.safetensors")
    fold_checkpoint(raw, tmp_path / "from raw")
    for folder in ("folded", "from raw"):
        stock, info = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        torch.testing.assert_close(output(stock, "mixtral"), answer, **ROUNDING)


def resumable(name, patched, folder, **options):
    head = build(name)
    head.config.attention_dropout = 0.1
    for layer in head.model.layers:
        layer.self_attn.attention_dropout = 0.1
    if patched:
        hf_stable.patch(head, "sigma_reparam", init="one")
    ids = torch.randint(3, 37, (24, 8), generator=torch.Generator().manual_seed(2))
    args = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=1,
        logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
        optim="adamw2",
    )  # fmt: skip
    examples = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(head, args, train_dataset=examples, **options)


@pytest.mark.slow
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
def test_a_trainer_resumes_the_experts_bit_for_bit(name, patched, tmp_path):
    whole = resumable(name, patched, tmp_path / "whole")
    whole.train()
    resumable(name, patched, tmp_path / "cut", callbacks=[Interrupt(2)]).train()
    resumed = resumable(name, patched, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert {step: losses(whole)[step] for step in (3, 4)}.items() <= losses(resumed).items()
    assert same_state(resumed.model, whole.model)

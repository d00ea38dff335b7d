"""torch.compile through the Trainer, and half precision over many steps."""

from __future__ import annotations

import pytest
import torch
from tiny_models import sgd_steps, tiny_batch, tiny_model
from tiny_training import losses, make_trainer
from torch._dynamo.utils import counters

import hf_stable
from hf_stable.methods.sigma_reparam.method import sigma_layers

BATCHES = dict(max_steps=6, save_strategy="no", optim="adamw2")  # five of one size: 40 / 8


def train(model_type, folder, *, patched=True, **options):
    model = tiny_model(model_type)
    if patched:
        hf_stable.patch(model, "sigma_reparam", init="one")
    trainer = make_trainer(model, folder, **(BATCHES | options))
    trainer.train()
    return [loss for loss, _ in losses(trainer).values()]


def compiled(model_type, folder, **options):
    """Losses of a compiled run, its graph breaks and the number of its graphs."""
    torch._dynamo.reset()
    counters.clear()
    found = train(model_type, folder, torch_compile=True, **options)
    return found, sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "swin"])  # fused projections, and windows
def test_the_trainer_compiles_a_patched_model_like_a_plain_one(model_type, tmp_path):
    eager = train(model_type, tmp_path / "eager")
    backend = dict(torch_compile_backend="eager")  # the same graphs, without compiling them further
    ours, breaks, graphs = compiled(model_type, tmp_path / "ours", **backend)
    _, plain_breaks, plain_graphs = compiled(
        model_type, tmp_path / "plain", patched=False, **backend
    )
    assert ours == pytest.approx(eager, rel=1e-4)
    assert (breaks, graphs) == (plain_breaks, plain_graphs)
    assert graphs > 0 and max(eager) - min(eager) > 1e-3
    # More steps make no more graphs: nothing is compiled again.
    _, _, later = compiled(model_type, tmp_path / "longer", **(backend | dict(max_steps=15)))
    assert later == graphs


@pytest.mark.slow
def test_a_mode_for_gpus_trains_to_the_same_losses(tmp_path):
    eager = train("gpt2", tmp_path / "eager")
    found, _, _ = compiled("gpt2", tmp_path / "compiled", torch_compile_mode="reduce-overhead")
    assert found == pytest.approx(eager, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_gamma_goes_on_moving_in_bfloat16(precision):
    """A bfloat16 gamma near 1 would stand still under steps below 0.004."""
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam", init="one")
    if precision == "weights":
        model.to(torch.bfloat16)
    layers = [layer for _, layer in sigma_layers(model)]
    optimizer = hf_stable.AdamW2(model.named_parameters(), lr=1e-4, tau=1e-2)
    batch = tiny_batch(model)
    stuck, values = 0, [torch.cat([layer.gamma.detach().clone() for layer in layers])]
    for _ in range(200):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(torch.cat([layer.gamma.detach().clone() for layer in layers]))
        stuck += int((values[-1] == values[-2]).sum())
    for layer in layers:
        for tensor in (layer.gamma, layer.sigma, layer.sigma_u, layer.sigma_v):
            assert tensor.dtype == torch.float32
    assert stuck < 0.01 * 200 * len(values[0])
    moved = (values[-1] - values[0]).abs()
    assert moved.median() > 2e-3
    # In bfloat16 most of these steps would have been lost.
    steps = torch.stack([(b - a).abs() for a, b in zip(values, values[1:], strict=False)])
    assert (steps < torch.finfo(torch.bfloat16).eps / 4).float().mean() > 0.5


def test_torch_export_takes_a_model_that_was_folded_in_place(model_type):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam")
    sgd_steps(model)
    model.eval()
    inputs = {name: t for name, t in tiny_batch(model).items() if name != "labels"}
    inputs |= {"return_dict": False} | ({"use_cache": False} if model_type == "gpt2" else {})
    with torch.no_grad():
        expected = model(**inputs)[0]
        program = torch.export.export(hf_stable.fold(model), (), kwargs=inputs)
        torch.testing.assert_close(program.module()(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert not [name for name in program.state_dict if "sigma" in name or "gamma" in name]

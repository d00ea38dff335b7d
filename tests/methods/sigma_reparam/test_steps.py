"""u, v and sigma move once per optimizer step, with the weights that moved, and never else."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from gloo_ranks import run_ranks
from reference import sigma_reparam_svd as reference
from tiny_models import sgd_steps, tiny_batch, tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hf_stable
from hf_stable.kernels.choosing import SWITCH
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.steps import (
    follow,
    forget,
    install_hooks,
    live_layers,
    refresh,
)


def patched(model_type="vit", head=None, power_iterations=1, **overrides):
    """A patched model whose v is far from converged, so that every iteration can be told apart."""
    model = tiny_model(model_type, head, **overrides)
    hf_stable.patch(model, "sigma_reparam", power_iterations=power_iterations)
    generator = torch.Generator().manual_seed(7)
    for layer in layers_of(model):
        v = torch.randn(layer.sigma_v.shape, generator=generator)
        blocks = reference.blocks_of(layer.weight.detach(), layer.num_parts, layer.parts.dim)
        u = torch.stack([block @ each for block, each in zip(blocks, v, strict=True)])
        layer.sigma_u.copy_(u / u.norm(dim=1, keepdim=True))
        layer.sigma_v.copy_(v / v.norm(dim=1, keepdim=True))
        layer.sigma.copy_(
            reference.sigma_of(layer.weight.detach(), layer.sigma_u, layer.sigma_v, layer.parts.dim)
        )
    return model


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, SigmaLayer)]


def triples_of(model):
    names = ("sigma", "sigma_u", "sigma_v")
    return [[getattr(layer, name).clone() for name in names] for layer in layers_of(model)]


def same(triples, others):
    pairs = zip(triples, others, strict=True)
    return [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in pairs]


def num_refreshes(layer, old_triple, weight=None):
    """How many power iterations on the present weight lead from the old triple to the present."""
    weight = layer.weight.detach() if weight is None else weight
    blocks = reference.blocks_of(weight.double(), layer.num_parts, layer.parts.dim)
    v = old_triple[2].double()
    matches = [0] if all(
        torch.equal(old, getattr(layer, name))
        for old, name in zip(old_triple, ("sigma", "sigma_u", "sigma_v"), strict=True)
    ) else []  # fmt: skip
    for iteration in range(1, 5):
        u = torch.stack([block @ each for block, each in zip(blocks, v, strict=True)])
        u /= u.norm(dim=1, keepdim=True)
        z = torch.stack([block.T @ each for block, each in zip(blocks, u, strict=True)])
        sigma = z.norm(dim=1)
        v = z / sigma[:, None]
        found = (layer.sigma.double(), layer.sigma_u.double(), layer.sigma_v.double())
        pairs = zip(found, (sigma, u, v), strict=True)
        if all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs):
            matches.append(iteration)
    assert len(matches) == 1, f"the number of refreshes is not clear: {matches}"
    return matches[0]


def refreshes_of(model, old_triples):
    return [num_refreshes(*pair) for pair in zip(layers_of(model), old_triples, strict=True)]


def backward(model, **kwargs):
    loss = model(**tiny_batch(model, **kwargs)).loss
    loss.backward()
    return loss


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD, single tensors": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_refresh_per_step_under_any_optimizer(build):
    model = patched()
    optimizer = build(model.parameters())
    for step in range(3):
        backward(model, seed=step)
        raw = [layer.weight.clone() for layer in layers_of(model)]
        before = triples_of(model)
        optimizer.step()
        assert not any(
            torch.equal(a, layer.weight) for a, layer in zip(raw, layers_of(model), strict=True)
        )
        assert refreshes_of(model, before) == [1] * len(before)
        optimizer.zero_grad()


def test_one_refresh_per_step_in_every_architecture(model_type):
    model = patched(model_type)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    before = triples_of(model)
    optimizer.step()
    assert set(refreshes_of(model, before)) == {1}


def test_sigma_follows_training_that_a_stored_one_would_lose():
    model = tiny_model("vit")
    hf_stable.patch(model, "sigma_reparam", init="one")
    start = [sigma.clone() for sigma, _, _ in triples_of(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(20):
        backward(model, seed=step)
        optimizer.step()
        optimizer.zero_grad()
    stale = 0.0
    for layer, old in zip(layers_of(model), start, strict=True):
        exact = reference.svd_triple(layer.weight.flatten(1))[0].item()
        assert layer.sigma.item() == pytest.approx(exact, rel=2e-2)
        stale = max(stale, abs(old.item() / exact - 1))
    assert stale > 0.1


@pytest.mark.parametrize("kernels", ["", "torch"])
@pytest.mark.parametrize("power_iterations", [1, 3])
def test_a_step_takes_as_many_iterations_as_the_config_says(power_iterations, kernels, monkeypatch):
    monkeypatch.setenv(SWITCH, kernels)
    model = patched("gpt2", power_iterations=power_iterations)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = triples_of(model)
    backward(model)
    optimizer.step()
    assert set(refreshes_of(model, before)) == {power_iterations}


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_a_graph_from_before_a_refresh_is_not_used_behind_it(kernels, monkeypatch):
    """The backward would take the new vectors for those of the forward."""
    monkeypatch.setenv(SWITCH, kernels)
    model = patched()
    loss = model(**tiny_batch(model)).loss
    refresh(layers_of(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_refresh_alone_moves_once_and_keep_holds(kernels, monkeypatch):
    monkeypatch.setenv(SWITCH, kernels)
    model = patched("gpt2")
    before = triples_of(model)
    refresh(layers_of(model), keep=torch.tensor(1.0))
    assert all(same(before, triples_of(model)))
    refresh(layers_of(model), keep=torch.tensor(0.0))
    assert set(refreshes_of(model, before)) == {1}


# What must not move them


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forwards_and_backwards_move_nothing(model_type, training):
    model = patched(model_type).train(training)
    before = copy.deepcopy(model.state_dict())
    backward(model)
    with torch.no_grad():
        model(**tiny_batch(model))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    sgd_steps(model, steps=1)
    assert any(not torch.equal(before[name], model.state_dict()[name]) for name in before)


def train(model, *, steps=3, micro_batches=1):
    """Losses of SGD on batches of 8, in so many parts; the gradient is that of the mean."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        batch = tiny_batch(model, size=8, seed=step)
        parts = [
            dict(zip(batch, part, strict=True))
            for part in zip(*(v.chunk(micro_batches) for v in batch.values()), strict=True)
        ]
        total = 0.0
        for part in parts:
            loss = model(**part).loss / micro_batches
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_is_exact(model_type, use_reentrant):
    plain, checkpointed = patched(model_type), patched(model_type)
    expected = train(plain)
    # transformers is renaming the method.
    new_name, old_name = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    enable = getattr(checkpointed, new_name if hasattr(checkpointed, new_name) else old_name)
    enable({"use_reentrant": use_reentrant})
    forwards = []
    # Before the forward: torch ends the second one as soon as it has all that it needs.
    layers_of(checkpointed)[-1].register_forward_pre_hook(lambda *_: forwards.append(1))
    if model_type == "swin" and use_reentrant:
        # A plain Swin rounds otherwise too: its stages are checkpointed around its blocks.
        assert train(checkpointed) == pytest.approx(expected, rel=1e-6)
        return
    assert train(checkpointed) == expected
    if model_type in ("gpt2", "vit"):  # there the last layer is in a block, not after it
        assert len(forwards) == 6, "nothing was computed twice"
    for name, value in plain.state_dict().items():
        assert torch.equal(value, checkpointed.state_dict()[name]), name
    assert not torch.equal(plain.state_dict()[name], patched(model_type).state_dict()[name])


def test_accumulation_of_four_equals_one_batch(model_type):
    whole, parts = patched(model_type), patched(model_type)
    expected = train(whole)
    assert train(parts, micro_batches=4) == pytest.approx(expected, rel=1e-5)
    fresh = patched(model_type).state_dict()
    moved = 0.0
    for name, value in whole.state_dict().items():
        # The sums of the four gradients round otherwise than one gradient's: in each of three
        # steps by some ten half units (6e-8) of numbers near one.
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-5, atol=2e-6)
        moved = max(moved, (value.float() - fresh[name]).abs().max().item())
    assert moved > 1e-2


def test_frozen_weights_stay():
    model = patched()
    frozen, *others = layers_of(model)
    frozen.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # it holds the frozen weight too
    before = triples_of(model)
    backward(model)
    optimizer.step()
    assert same(before, triples_of(model)) == [True] + [False] * len(others)


def test_two_models_side_by_side_train_as_alone():
    alone = [patched(seed=0), patched("gpt2", seed=1)]
    expected = [sgd_steps(model, steps=3) for model in alone]
    together = [patched(seed=0), patched("gpt2", seed=1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in together]
    losses = [[], []]
    for step in range(3):
        for index, (model, optimizer) in enumerate(zip(together, optimizers, strict=True)):
            optimizer.zero_grad()
            losses[index].append(backward(model, seed=step).item())
            other = triples_of(together[1 - index])
            optimizer.step()
            assert all(same(other, triples_of(together[1 - index])))
    assert losses == expected
    for one, other in zip(alone, together, strict=True):
        assert all(same(triples_of(one), triples_of(other)))


def test_an_optimizer_refreshes_the_weights_that_it_owns():
    model = patched()
    optimizer = torch.optim.SGD(model.vit.layers[0].parameters(), lr=0.1)
    owned = layers_of(model.vit.layers[0])
    backward(model)
    before = triples_of(model)
    optimizer.step()
    expected = [int(any(layer is mine for mine in owned)) for layer in layers_of(model)]
    assert refreshes_of(model, before) == expected and 0 < sum(expected) < len(expected)


def test_an_optimizer_without_matrices_refreshes_nothing():
    model = patched()
    optimizer = torch.optim.SGD([layer.gamma for layer in layers_of(model)], lr=0.1)
    backward(model)
    before = triples_of(model)
    gamma = layers_of(model)[0].gamma.clone()
    optimizer.step()
    assert all(same(before, triples_of(model)))
    assert not torch.equal(gamma, layers_of(model)[0].gamma)


# Skipped steps


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_step_that_the_scaler_skips_keeps_everything(fused):
    model = patched()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(gradient_factor):
        optimizer.zero_grad()
        scaler.scale(model(**tiny_batch(model)).loss).backward()
        layers_of(model)[0].weight.grad.mul_(gradient_factor)
        scaler.step(optimizer)
        scaler.update()

    for factor in (1.0, float("inf"), 1.0):
        before, weights = triples_of(model), copy.deepcopy(model.state_dict())
        step(factor)
        if factor == 1.0:
            assert set(refreshes_of(model, before)) == {1}
        else:
            assert all(torch.equal(weights[n], value) for n, value in model.state_dict().items())
            assert scaler.get_scale() == 4.0, "the scaler has seen no overflow"


def test_a_step_that_raises_leaves_the_next_ones_right():
    model = patched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fail():
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        optimizer.step(fail)
    for _ in range(2):
        backward(model)
        before = triples_of(model)
        optimizer.step()
        assert set(refreshes_of(model, before)) == {1}


def test_a_weight_that_turns_bad_reports_nan_and_recovers():
    model = patched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = layers_of(model)[1]
    backward(model)
    good, before = layer.weight.detach().clone(), triples_of(model)[1]
    layer.weight.grad.fill_(float("nan"))
    optimizer.step()
    assert layer.sigma.isnan().all()
    assert torch.equal(layer.sigma_u, before[1]) and torch.equal(layer.sigma_v, before[2])
    with torch.no_grad():
        layer.weight.copy_(good)
    optimizer.zero_grad()
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert num_refreshes(layer, [torch.zeros(1), *before[1:]]) == 1


# Optimizers that wrap others, and copies


def test_accelerate_steps_refresh_once():
    accelerator = Accelerator(cpu=True)
    model = patched()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    accelerator.backward(model(**tiny_batch(model)).loss)
    before = triples_of(model)
    optimizer.step()
    assert set(refreshes_of(model, before)) == {1}


class Lookahead(torch.optim.Optimizer):
    """Moves the weights a second time after the optimizer inside has stepped."""

    def __init__(self, inner, blend=0.5):
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner, self.blend = inner, blend
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step(closure)
        for parameter, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
            slow.lerp_(parameter, self.blend)
            parameter.copy_(slow)


def test_only_the_outermost_of_nested_optimizers_refreshes():
    model = patched()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = Lookahead(inner)
    for outermost in (optimizer, inner, optimizer):
        backward(model)
        before = triples_of(model)
        outermost.step()
        assert set(refreshes_of(model, before)) == {1}  # on the weights as they are in the end
        model.zero_grad()


def test_hooks_are_installed_once():
    for _ in range(3):
        install_hooks()
    model = patched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    before = triples_of(model)
    optimizer.step()
    assert set(refreshes_of(model, before)) == {1}


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_of_the_model_keeps_refreshing(model_type, duplicate):
    model = patched(model_type)
    twin = duplicate(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    backward(twin)
    before, untouched = triples_of(twin), triples_of(model)
    optimizer.step()
    assert set(refreshes_of(twin, before)) == {1}
    assert all(same(untouched, triples_of(model)))


def test_a_dropped_model_is_forgotten():
    model = patched()
    numbers = {layer.serial_number for layer in layers_of(model)}
    assert numbers <= {layer.serial_number for layer in live_layers()}
    del model
    gc.collect()
    assert not numbers & {layer.serial_number for layer in live_layers()}


def test_following_numbers_a_layer_anew_and_forgetting_stops_it():
    model = patched()
    layer = layers_of(model)[0]
    newest = max(each.serial_number for each in live_layers())
    follow(layer)
    assert layer.serial_number > newest and live_layers()[-1] is layer
    forget(layer)
    assert not any(each is layer for each in live_layers())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    before = triples_of(model)
    optimizer.step()
    assert refreshes_of(model, before) == [0] + [1] * (len(before) - 1)


# A gamma that nobody trains


def test_an_optimizer_built_before_the_patch_is_an_error_at_its_first_step():
    model = tiny_model("vit")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hf_stable.patch(model, "sigma_reparam")
    backward(model)
    with pytest.raises(
        RuntimeError,
        match=r"13 reparametrised layers \(first: 'vit.embeddings.patch_embeddings.projection'\) "
        "have their weight in the optimizer but not their gamma.*then collect the groups",
    ):
        optimizer.step()


def test_groups_collected_before_the_patch_are_told_from_the_optimizer():
    """The optimizer is built after the patch, from parameters that were collected before it."""
    model = tiny_model("vit")
    groups = [{"params": list(model.parameters()), "lr": 0.1}]
    hf_stable.patch(model, "sigma_reparam")
    optimizer = torch.optim.SGD(groups)
    backward(model)
    with pytest.raises(RuntimeError, match="parameters were collected before hf_stable.patch"):
        optimizer.step()


def test_patching_again_under_an_old_optimizer_is_an_error_too():
    model = patched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    hf_stable.fold(model)
    backward(model)
    optimizer.step()  # a plain model: nothing to complain about
    hf_stable.patch(model, "sigma_reparam")
    backward(model)
    with pytest.raises(RuntimeError, match="but not their gamma"):
        optimizer.step()


def weights_only(model):
    return [p for name, p in model.named_parameters() if not name.endswith("gamma")]


@pytest.mark.parametrize("first_lives", [True, False])
def test_a_later_optimizer_is_checked_as_the_first_was(first_lives):
    model = patched()
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    first.step()
    if not first_lives:
        del first
        gc.collect()
    later = torch.optim.SGD(weights_only(model), lr=0.1)
    backward(model)
    with pytest.raises(RuntimeError, match="13 reparametrised layers .* but not their gamma"):
        later.step()


def test_a_group_that_joins_later_is_checked():
    model = patched()
    optimizer = torch.optim.SGD(model.vit.layers[0].parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    optimizer.add_param_group({"params": weights_only(model.vit.layers[1])})
    with pytest.raises(RuntimeError, match=r"\(first: 'vit.layers.1.*but not their gamma"):
        optimizer.step()


def test_an_optimizer_of_a_model_that_was_folded_since_is_warned_of_once():
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    optimizer = torch.optim.AdamW(hf_stable.parameter_groups(model))
    plain = hf_stable.fold(copy.deepcopy(model))  # another model is no concern of its
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, optimizer)
        step(plain, torch.optim.AdamW(plain.parameters()))
    hf_stable.fold(model)
    with pytest.warns(UserWarning, match="turned 13 layers into plain ones since this optimizer"):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, optimizer)
        step(model, torch.optim.AdamW(model.parameters()))


def step(model, optimizer):
    model(**tiny_batch(model)).loss.backward()
    optimizer.step()


def test_a_gamma_left_frozen_by_its_weight_is_warned_of_once():
    model = tiny_model("vit").requires_grad_(False)
    hf_stable.patch(model, "sigma_reparam")
    for weight in weights_only(model):
        weight.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    backward(model)
    with pytest.warns(UserWarning, match="13 reparametrised layers .* frozen gamma.*unfreeze it"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_gamma_frozen_on_purpose_is_no_error():
    model = patched()
    for layer in layers_of(model):
        layer.gamma.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    backward(model)
    before = triples_of(model)
    with pytest.warns(UserWarning, match="unless this is meant"):
        optimizer.step()
    assert set(refreshes_of(model, before)) == {1}


@pytest.mark.parametrize("matrices_first", [True, False])
def test_two_optimizers_may_share_a_model(matrices_first):
    model = patched()
    matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=0.1)
    others = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-2)
    backward(model)
    before, gammas = triples_of(model), [layer.gamma.clone() for layer in layers_of(model)]
    for optimizer in (matrices, others) if matrices_first else (others, matrices):
        optimizer.step()
    assert set(refreshes_of(model, before)) == {1}
    assert all(
        not torch.equal(old, layer.gamma)
        for old, layer in zip(gammas, layers_of(model), strict=True)
    )


def by_names(model, *without):
    """Groups as many scripts build them: no decay for names that have one of these in them."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if any(part in name for part in without)]
    decayed = [p for name, p in named if not any(part in name for part in without)]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def warnings_of_decay(optimizer, model, steps=3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            backward(model)
            optimizer.step()
    return [str(w.message) for w in caught if "weight_decay" in str(w.message)]


@pytest.mark.parametrize("build", [torch.optim.AdamW, torch.optim.SGD, hf_stable.AdamW2])
def test_a_decayed_gamma_is_warned_of_once_with_the_remedy(build):
    model = patched("bert")
    optimizer = build(by_names(model, "bias", "LayerNorm.weight"), lr=1e-3)
    (message,) = warnings_of_decay(optimizer, model)
    num_layers = len(layers_of(model))
    assert f"weight_decay=0.1 is applied to gamma of {num_layers} reparametrised" in message
    assert repr(layers_of(model)[0].layer_name) in message
    # The remedies that it names.
    for groups in (
        by_names(model, "bias", "LayerNorm.weight", "gamma"),
        hf_stable.parameter_groups(model, weight_decay=0.1),
    ):
        assert not warnings_of_decay(build(groups, lr=1e-3), model)


def test_a_gamma_that_another_optimizer_decays_is_warned_of():
    model = patched("vit")
    matrices = {id(layer.weight) for layer in layers_of(model)}
    rest = [p for p in model.parameters() if id(p) not in matrices]
    first = torch.optim.SGD([layer.weight for layer in layers_of(model)], lr=0.1)
    second = torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.2)
    backward(model)
    first.step()
    (message,) = warnings_of_decay(second, model)
    assert "weight_decay=0.2" in message


# Several processes


def train_in_ranks():
    """On each rank: refreshes per layer and step, final weights, for three ways to distribute."""
    return {name: _train_wrapped(wrap) for name, wrap in WRAPPERS.items()} | {
        "refused": _patch_under_ddp(),
        "too late": _wrap_before_patch(),
    }


def _zero(model):
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)
    return DistributedDataParallel(model), optimizer


def _ddp(model):
    return DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1)


def _fsdp2(model):
    for layer in model.vit.layers:
        fully_shard(layer)
    fully_shard(model)
    assert isinstance(layers_of(model)[0].weight, DTensor)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _alone(model):
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


WRAPPERS = {"zero": _zero, "ddp": _ddp, "fsdp2": _fsdp2, "alone": _alone}


def _train_wrapped(wrap):
    model = patched()
    wrapped, optimizer = wrap(model)
    counts = []
    for step in range(3):
        optimizer.zero_grad()
        wrapped(**tiny_batch(model, seed=step)).loss.backward()
        before = triples_of(model)
        optimizer.step()
        counts += [
            num_refreshes(layer, old, _whole(layer.weight))
            for layer, old in zip(layers_of(model), before, strict=True)
        ]
    state = {name: _whole(value).detach().clone() for name, value in model.state_dict().items()}
    hf_stable.fold(model)
    folded = {name: _whole(value).detach().clone() for name, value in model.state_dict().items()}
    return {"counts": counts, "state": state, "folded": folded}


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _patch_under_ddp():
    messages = []
    model = tiny_model("vit")
    ddp = DistributedDataParallel(model)
    for target in (ddp, model):
        try:
            hf_stable.patch(target, "sigma_reparam")
        except hf_stable.UnsupportedModelError as error:
            messages.append(str(error))
    return messages


def _wrap_before_patch():
    """A part of the model was wrapped: patch() sees no wrapper around what it is given."""
    model = tiny_model("vit")
    ddp = DistributedDataParallel(model.vit)
    hf_stable.patch(model, "sigma_reparam")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ddp(pixel_values=tiny_batch(model)["pixel_values"]).last_hidden_state.sum().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)


@pytest.mark.slow
def test_refreshes_are_one_per_layer_and_step_in_every_process():
    ranks = run_ranks(train_in_ranks, 2)
    assert not dist.is_initialized()
    for rank in ranks:
        expected = rank["alone"]
        for name in ("zero", "ddp", "fsdp2"):
            assert set(rank[name]["counts"]) == {1}, name
            for kind in ("state", "folded"):
                assert rank[name][kind].keys() == expected[kind].keys()
                for key, value in expected[kind].items():
                    # Every rank has the same batch: only the order of sums differs.
                    torch.testing.assert_close(
                        rank[name][kind][key],
                        value,
                        rtol=1e-4,
                        atol=1e-5,
                        msg=lambda text, where=(name, kind, key): f"{where}: {text}",
                    )
                    assert torch.equal(ranks[0][name][kind][key], rank[name][kind][key])
        assert len(rank["refused"]) == 2
        assert all("wrapped in DistributedDataParallel" in text for text in rank["refused"])
        assert "is not averaged over ranks" in rank["too late"]
    weight = "vit.layers.0.mlp.fc1.weight"
    assert not torch.allclose(expected["state"][weight], tiny_model("vit").state_dict()[weight])

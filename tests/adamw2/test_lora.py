"""AdamW2 on LoRA: the bound on the merged weight, against singular values of formed matrices."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from gloo_ranks import run_ranks
from tiny_models import tiny_batch, tiny_model
from tiny_training import Interrupt, losses, make_trainer, same_state
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

import hf_stable
from hf_stable.adamw2.lora_layers import find_lora_layers
from hf_stable.adamw2.model_optimizer import ModelAdamW2
from hf_stable.adamw2.optimizer import AdamW2
from hf_stable.adamw2.weights import LORA_STATE
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.measures.parts import Parts

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning"  # PEFT's own
)

TAU = 0.01


def sigma1(matrix):
    return torch.linalg.matrix_norm(matrix.detach().double(), 2).item()


def factors(*, m=11, n=14, r=3, dtype=torch.float64, seed=0, up_std=1.0):
    """A, B and a frozen W0."""
    generator = torch.Generator().manual_seed(seed)
    down, up, base = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((r, n), (m, r), (m, n))
    )
    return nn.Parameter(down), nn.Parameter(up * up_std), nn.Parameter(base, requires_grad=False)


def group_of(layers, *, scale=2.0, **options):
    return dict(params=[p for layer in layers for p in layer], lora_scale=scale, **options)


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        if param.requires_grad:
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = grad.to(param.dtype)


def update_of(optimizer, param):
    """Return U_t from the moments that the last step left."""
    state, group = optimizer.state[param], optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    t = state["step"].item()
    root = (state["exp_avg_sq"].double() / (1 - beta2**t)).sqrt()
    return state["exp_avg"].double() / (1 - beta1**t) / (root + group["eps"])


def lora(model, **options):
    options = dict(r=2, lora_alpha=8, target_modules="all-linear") | options
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def changes(layers, old, new):
    """Return |W' - W| / |W| of every merged weight, between two copies of all factors."""
    ratios = []
    for layer, before, after in zip(layers, old, new, strict=True):
        base = layer.base.T if layer.transposed else layer.base
        products = [layer.scale * up.double() @ down.double() for down, up in (before, after)]
        merged = base.double() + products[0]
        ratios.append(sigma1(products[1] - products[0]) / sigma1(merged))
    return ratios


def copies(layers):
    return [(layer.down.detach().clone(), layer.up.detach().clone()) for layer in layers]


# ---- against formed matrices ----


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("up_std", [0.0, 1.0])
def test_the_rate_is_the_one_that_formed_matrices_give(up_std, weight_decay):
    """Float64, singular values of everything formed; the rate solves the quadratic of the bound."""
    down, up, base = factors(up_std=up_std)
    scale, lr = 2.0, 0.05
    options = dict(lr=lr, tau=TAU, weight_decay=weight_decay)
    optimizer = AdamW2([group_of([(down, up, base)], scale=scale)], power_iterations=200, **options)
    clipped = 0
    for step in range(6):
        set_grads([down, up], step)
        a, b, w = (p.detach().clone() for p in (down, up, base))
        optimizer.step()
        u_a, u_b = update_of(optimizer, down), update_of(optimizer, up)
        linear, quadratic = scale * sigma1(u_b @ a + b @ u_a), scale * sigma1(u_b @ u_a)
        allowed = TAU * sigma1(w + scale * b @ a)
        rate = min(lr, 2 * allowed / (linear + (linear**2 + 4 * quadratic * allowed) ** 0.5))
        assert optimizer.effective_lr()[up] == pytest.approx(rate, rel=1e-4)
        assert optimizer.effective_lr()[down] == optimizer.effective_lr()[up]
        kept = 1 - rate * weight_decay
        torch.testing.assert_close(down.detach(), kept * a - rate * u_a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(up.detach(), kept * b - rate * u_b, rtol=1e-4, atol=1e-6)
        # What is asked for: the change to first order, and here the whole of it too.
        assert rate * linear <= allowed * (1 + 1e-4)
        moved = scale * sigma1((b - rate * u_b) @ (a - rate * u_a) - b @ a)
        assert moved <= allowed * (1 + 1e-4)
        assert torch.equal(base, w)
        clipped += rate < lr
    assert clipped == 6


def test_a_bound_that_is_far_away_changes_nothing():
    ours, theirs = factors(), factors()
    optimizer = AdamW2([group_of([ours])], lr=1e-3, tau=1e6, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs[:2], lr=1e-3, weight_decay=0.1)
    for step in range(20):
        for params, each in ((ours, optimizer), (theirs, adamw)):
            set_grads(params, step)
            each.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    assert not torch.equal(ours[1], factors()[1])
    without = factors()
    optimizer = AdamW2([group_of([without], tau=float("inf"))], lr=1e-3, weight_decay=0.1)
    for step in range(20):
        set_grads(without, step)
        optimizer.step()
    torch.testing.assert_close(without[1], theirs[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [dict(m=9, n=9), dict(m=5, n=12)], ids=["square", "wide"])
def test_a_transposed_weight_is_the_same_weight(shape):
    plain, turned = factors(**shape), factors(**shape)
    turned = (*turned[:2], nn.Parameter(turned[2].T.contiguous(), requires_grad=False))
    optimizers = (
        AdamW2([group_of([plain])], lr=0.1, tau=TAU),
        AdamW2([group_of([turned], lora_transposed=True)], lr=0.1, tau=TAU),
    )
    for step in range(5):
        for params, optimizer in zip((plain, turned), optimizers, strict=True):
            set_grads(params, step)
            optimizer.step()
    torch.testing.assert_close(plain[1], turned[1])
    wrong = factors(m=9, n=9)
    optimizer = AdamW2([group_of([wrong], lora_transposed=True)], lr=0.1, tau=TAU)
    for step in range(5):
        set_grads(wrong, step)
        optimizer.step()
    assert shape["m"] != 9 or not torch.allclose(wrong[1], plain[1])


def test_layers_of_one_shape_are_stepped_as_each_alone():
    together = [factors(seed=seed, dtype=torch.float32) for seed in range(4)]
    together.append(factors(seed=9, m=6, dtype=torch.float32))
    alone = copy.deepcopy(together)
    first = AdamW2([group_of(together)], lr=0.1, tau=TAU)
    others = [AdamW2([group_of([layer])], lr=0.1, tau=TAU) for layer in alone]
    for step in range(4):
        for i, (mine, single) in enumerate(zip(together, alone, strict=True)):
            set_grads(mine, 10 * step + i)
            set_grads(single, 10 * step + i)
        first.step()
        for optimizer in others:
            optimizer.step()
    for mine, single in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, single, rtol=1e-4, atol=1e-5)


def test_half_precision_weights_below_and_factors():
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = factors(dtype=dtype)
        optimizer = AdamW2([group_of([layer])], lr=0.1, tau=TAU)
        for step in range(3):
            set_grads(layer, step)
            optimizer.step()
        assert optimizer.state[layer[1]]["merged_v"].dtype == torch.float32
        assert layer[1].dtype == dtype
        rates.append(optimizer.effective_lr()[layer[1]])
    assert rates[1] == pytest.approx(rates[0], rel=0.05)  # eight bits in every weight


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_spares_the_vectors(bad):
    layer = factors(dtype=torch.float32)
    optimizer = AdamW2([group_of([layer])], lr=0.1, tau=TAU)
    for step in range(3):
        set_grads(layer, step)
        if step == 2:
            layer[1].grad[0, 0] = bad
        optimizer.step()
    assert layer[0].isnan().all() and layer[1].isnan().all()
    assert all(optimizer.state[layer[1]][key].isfinite().all() for key in LORA_STATE)


def test_a_merged_weight_of_zero_is_exempt():
    down, up, base = factors(up_std=0.0)
    base.data.zero_()
    optimizer = AdamW2([group_of([(down, up, base)])], lr=1e-2, tau=TAU)
    for step in range(3):
        set_grads([down, up], step)
        optimizer.step()
    assert optimizer.effective_lr()[up] == pytest.approx(1e-2)
    assert up.any()


# ---- on models ----


@pytest.mark.parametrize("model_type", ["gpt2", "vit", "bert"])
def test_the_bound_holds_on_a_model_and_is_broken_without_the_option(model_type):
    """At one power iteration a step, on noise for data; and the same steps by the factors."""
    worst = {}
    for lora_option in ("merged", "factors"):
        torch.manual_seed(0)
        model = lora(tiny_model(model_type))
        layers = find_lora_layers(model)
        assert len(layers) >= 8
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = hf_stable.lora_groups(model) if lora_option == "merged" else trained
        optimizer = AdamW2(groups, lr=0.1, tau=TAU, weight_decay=0.0)
        ratios = []
        for step in range(12):
            optimizer.zero_grad()
            model(**tiny_batch(model, seed=step)).loss.backward()
            old = copies(layers)
            optimizer.step()
            ratios += changes(layers, old, copies(layers))
        assert all(layer.up.any() for layer in layers)
        worst[lora_option] = max(ratios)
    print(model_type, {name: value / TAU for name, value in worst.items()})
    assert worst["merged"] < 1.1 * TAU
    assert worst["factors"] > 3 * TAU


def test_groups_hold_everything_that_trains_once():
    model = lora(tiny_model("gpt2"), modules_to_save=["wte"], lora_bias=True)
    groups = hf_stable.lora_groups(model)
    members = [param for group in groups for _, param in group["params"]]
    assert len({id(p) for p in members}) == len(members)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    bases = [layer.base for layer in find_lora_layers(model)]
    assert {id(p) for p in members} == trained | {id(p) for p in bases}
    transposed = {group["lora_transposed"] for group in groups if "lora_scale" in group}
    assert transposed == {True} and {type(m) for m in model.modules()} >= {Conv1D}
    by_name = {name: group for group in groups for name, _ in group["params"]}
    embedding = next(name for name in by_name if "wte.modules_to_save" in name)
    assert by_name[embedding]["tau"] == float("inf")
    bias = next(name for name in by_name if "lora_B.default.bias" in name)
    assert "lora_scale" not in by_name[bias]


def test_scales_of_rslora_and_patterns_are_taken_from_the_layers():
    model = lora(tiny_model("vit"), use_rslora=True, rank_pattern={"q_proj": 4})
    groups = [group for group in hf_stable.lora_groups(model) if "lora_scale" in group]
    assert {group["lora_scale"] for group in groups} == {8 / 2**0.5, 8 / 4**0.5}


def test_a_convolution_is_a_matrix():
    model = lora(tiny_model("vit"), target_modules=["projection"])
    (layer,) = find_lora_layers(model)
    assert layer.base.ndim == layer.down.ndim == 4
    optimizer = AdamW2(hf_stable.lora_groups(model), lr=1.0, tau=TAU, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        model(**tiny_batch(model, seed=step)).loss.backward()
        old = (layer.up.flatten(1) @ layer.down.flatten(1)).detach().clone()
        optimizer.step()
        new = layer.up.flatten(1) @ layer.down.flatten(1)
        merged = layer.base.flatten(1) + layer.scale * old
        assert 0.5 * TAU < layer.scale * sigma1(new - old) / sigma1(merged) < 1.1 * TAU


# ---- an optimizer like any other ----


@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continues_bit_for_bit(way, dtype, tmp_path):
    layers = [factors(dtype=dtype, seed=seed) for seed in range(2)]
    optimizer = AdamW2([group_of(layers)], lr=0.1, tau=TAU)

    def train(layers, optimizer, steps):
        for step in steps:
            for i, layer in enumerate(layers):
                set_grads(layer, 10 * step + i)
            optimizer.step()

    train(layers, optimizer, range(3))
    if way == "deepcopy":
        copied, other = copy.deepcopy((layers, optimizer))
    elif way == "pickle":
        copied, other = pickle.loads(pickle.dumps((layers, optimizer)))
    else:
        state = copy.deepcopy(optimizer.state_dict())
        assert state["state"].keys() == {0, 1, 3, 4}  # no frozen weight in it
        if way == "file":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        copied = copy.deepcopy(layers)
        other = AdamW2([group_of(copied)], lr=0.1, tau=TAU)
        other.load_state_dict(state)
    held = other.param_groups[0]["params"]
    assert all(held[3 * i + j] is copied[i][j] for i in range(2) for j in range(3))
    train(layers, optimizer, range(3, 6))
    train(copied, other, range(3, 6))
    for mine, theirs in zip(layers, copied, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.equal(layers[0][1], factors(dtype=dtype)[1])


@pytest.mark.parametrize("to_merged", [True, False])
def test_a_state_of_the_other_kind_keeps_the_moments(to_merged):
    layer = factors()
    ordinary = AdamW2([dict(params=list(layer))], lr=1e-2, tau=TAU)
    merged = AdamW2([group_of([layer])], lr=1e-2, tau=TAU)
    source, target = (ordinary, merged) if to_merged else (merged, ordinary)
    set_grads(layer, 0)
    source.step()
    state = copy.deepcopy(source.state_dict())
    options = ("lora_scale", "lora_transposed")
    own = {key: target.param_groups[0][key] for key in options}
    state["param_groups"][0] |= own
    target.load_state_dict(state)
    set_grads(layer, 1)
    target.step()
    assert target.state[layer[1]]["step"] == 2
    assert ("merged_v" in target.state[layer[1]]) == to_merged
    assert ("weight_v" in target.state[layer[1]]) != to_merged


@pytest.mark.parametrize("optim_args", ["tau=0.01,lora=merged", "tau=0.01"])
def test_the_trainer_trains_and_resumes_by_it(optim_args, tmp_path):
    def trainer(folder, **options):
        torch.manual_seed(0)
        model = lora(tiny_model("gpt2"), lora_dropout=0.1)
        return make_trainer(
            model, tmp_path / folder, optim="adamw2", optim_args=optim_args, max_steps=4,
            save_steps=2, learning_rate=0.1, weight_decay=0.1, **options,
        )  # fmt: skip

    whole = trainer("whole")
    layers = find_lora_layers(whole.model)
    start = copies(layers)
    whole.train()
    groups = whole.optimizer.param_groups
    assert any(group["lora_scale"] for group in groups) == ("merged" in optim_args)
    total = max(changes(layers, start, copies(layers)))
    if "merged" in optim_args:
        rates = whole.optimizer.optimizer.effective_lr()
        assert {n for n in rates if "lora_" in n} == {
            n for n, p in whole.model.named_parameters() if p.requires_grad
        }
        assert 0 < total < (1 + TAU) ** 4 - 1 + 1e-3
    else:
        assert total > 0.1
    trainer("cut", callbacks=[Interrupt(2)]).train()
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert same_state(resumed.model, whole.model)


# ---- what is refused ----


def frozen_factor(model):
    for name, param in model.named_parameters():
        param.requires_grad_(param.requires_grad and "lora_A" not in name)
    return model


def trained_base(model):
    return model.requires_grad_(True)


def second_adapter(model):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    return model


def tied_adapters(model):
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    layers[1].base_layer.weight = layers[0].base_layer.weight
    return model


REFUSED = {
    "dora": (lambda m: lora(m, use_dora=True), "is no plain LoRA (DoraLinearVariant)"),
    "one factor": (lambda m: frozen_factor(lora(m)), "has one of its factors frozen"),
    "trained weight": (lambda m: trained_base(lora(m)), "trains the weight under the adapter"),
    "two adapters": (lambda m: second_adapter(lora(m)), "has several trained adapters"),
    "shared": (lambda m: tied_adapters(lora(m)), "shares its weight with another layer"),
}


@pytest.mark.parametrize(("prepare", "text"), REFUSED.values(), ids=REFUSED)
def test_models_without_a_simple_merged_weight_are_refused(prepare, text):
    model = prepare(tiny_model("vit"))
    with pytest.raises(UnsupportedModelError, match="cannot bound the merged weight") as caught:
        hf_stable.lora_groups(model)
    assert text in str(caught.value)


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no layer of the model has a LoRA adapter"):
        hf_stable.lora_groups(tiny_model("vit"))
    for text, message in [
        ("lora=merged", "no merged weight to bound"),
        ("lora=merge", r"lora='merge' is not allowed \(did you mean 'merged'\?\)"),
    ]:
        trainer = make_trainer(tiny_model("vit"), tmp_path, optim="adamw2", optim_args=text)
        with pytest.raises(ValueError, match=message):
            trainer.create_optimizer()


def test_factors_in_different_groups_are_refused():
    model = lora(tiny_model("vit"))
    ups = [p for n, p in model.named_parameters() if "lora_B" in n]
    downs = [p for n, p in model.named_parameters() if "lora_A" in n]
    groups = [dict(params=ups, lr=1e-2), dict(params=downs, lr=1e-3)]
    with pytest.raises(ValueError, match="are in different groups"):
        ModelAdamW2(groups, structure=model, lora="merged")
    assert len(ModelAdamW2(groups, structure=model).param_groups) == 2


def test_groups_that_do_not_fit_are_refused():
    down, up, base = factors()
    for params, options, message in [
        ([down, up], {}, "three parameters for each layer"),
        ([up, down, base], {}, r"do not fit with lora_transposed=False"),
        ([down, up, base], {"lora_transposed": True}, "do not fit with lora_transposed=True"),
        ([down, up, base], {"lora_scale": 0.0}, "lora_scale=0.0"),
        ([down, up, base], {"lora_transposed": 2}, "lora_transposed=2"),
        ([down, up, base], {"parts": Parts((1, 1))}, "lora_scale or parts=|does not fit"),
        ([down, up, nn.Parameter(base.data)], {}, "is trained itself"),
        ([down, up, base.to(torch.int8)], {}, "int8"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            AdamW2([{"params": params, "lora_scale": 1.0} | options])
    optimizer = AdamW2([group_of([(down, up, base)])])
    up.grad = torch.ones_like(up)
    with pytest.raises(ValueError, match="only one has a gradient"):
        optimizer.step()


# ---- several processes ----


def ranks_train(kind: str):
    """Two steps of LoRA on this rank's half of the batch; the factors, or the error."""
    import torch.distributed as dist

    torch.manual_seed(0)
    model = lora(tiny_model("vit"))
    layers = find_lora_layers(model)
    try:
        if kind == "fsdp":
            fully_shard(model)
        wrapped = DistributedDataParallel(model) if kind in ("ddp", "zero") else model
        groups = hf_stable.lora_groups(model)
        options = dict(lr=0.1, tau=TAU)
        if kind == "zero":
            params = [param for _, param in groups[0]["params"]]
            optimizer = ZeroRedundancyOptimizer([groups[0] | {"params": params}], AdamW2, **options)
        else:
            optimizer = AdamW2(groups, **options)
        for step in range(2):
            batch = tiny_batch(model, seed=step)
            if kind in ("ddp", "zero"):
                batch = {key: value[dist.get_rank() :: 2] for key, value in batch.items()}
            optimizer.zero_grad()
            wrapped(**batch).loss.backward()
            optimizer.step()
    except ValueError as error:
        return str(error)
    return [factor for pair in copies(layers) for factor in pair]


@pytest.mark.slow
def test_ddp_trains_as_one_process_does():
    first, second = run_ranks(ranks_train, 2, "ddp")
    assert all(map(torch.equal, first, second))
    alone = ranks_train("alone")
    for mine, theirs in zip(first, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert any(factor.any() for factor in alone[1::2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [("fsdp", "these are sharded (FSDP2): use DDP"), ("zero", "does not work with lora_scale")],
)
def test_sharding_is_refused_with_the_reason(kind, message):
    for said in run_ranks(ranks_train, 2, kind):
        assert isinstance(said, str) and message in said

"""The probe on real models: the right numbers, and a run that does not notice."""

from __future__ import annotations

import json
import math
import threading
import warnings

import pytest
import torch
import transformers
from tiny_architectures import build
from tiny_models import MODEL_TYPES, sgd_steps, tiny_batch, tiny_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from hf_stable.architectures import registry
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.measures.entropy import attention_entropy
from hf_stable.methods.patching import fold, patch, sigma_layers
from hf_stable.monitor.observing import PREFIX, observing_attention
from hf_stable.monitor.probing import probe
from hf_stable.monitor.records import MAP_SIZE
from hf_stable.monitor.terms import names_of

ALL_TERMS = names_of()
ATTENTION_TERMS = names_of(seen=("attention",))
WEIGHT_TERMS = names_of(seen=("weights",))

FIFTEEN = (
    "sigma_wq", "sigma_wk", "sigma_wv", "sigma_wo", "sigma_w1", "sigma_w2", "sigma_qk", "sigma_ov",
    "sigma_w2w1", "norm_gamma1", "norm_beta1", "norm_gamma2", "norm_beta2", "norm_x", "norm_dx",
)  # fmt: skip


def lively_model(model_type, **overrides):
    """A model whose attention is not nearly uniform and whose biases are not zero."""
    model = tiny_model(model_type, **overrides)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
            parameter.data *= 25
        elif parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def padded_batch(model):
    batch = tiny_batch(model)
    batch["attention_mask"] = torch.ones(4, 12, dtype=torch.long)
    batch["attention_mask"][0, :5] = 0
    batch["attention_mask"][1, 9:] = 0
    return batch


def run(model, batch):
    """One forward and backward; the logits, the loss and every gradient."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [output.logits.detach(), output.loss.detach(), *gradients]


def assert_same_tensors(left, right):
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_same_records(left, right, *, terms=ALL_TERMS, atol=1e-5, rtol=1e-5):
    for term in terms:
        a, b = getattr(left, term), getattr(right, term)
        assert list(a) == list(b), term
        for layer in a:
            if term == "mode":
                assert a[layer] == b[layer]
            else:
                torch.testing.assert_close(
                    a[layer],
                    b[layer],
                    atol=atol,
                    rtol=rtol,
                    equal_nan=True,
                    msg=lambda text, at=f"{term} {layer}": f"{at}: {text}",
                )


def eager_probabilities(model, batch):
    """Attention probabilities of every layer by the eager path, in model order."""
    found, native = [], model.config._attn_implementation
    hooks = [
        m.register_forward_hook(lambda m, args, out: found.append(out[1].detach()))
        for m in model.modules()
        if hasattr(m, "is_causal")
    ]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**batch)
    model.set_attn_implementation(native)
    for hook in hooks:
        hook.remove()
    return found


def exact_entropies(model):
    """What sdpa is given from now on: the dtype, and the entropy of its heads in float64."""
    found, native = [], AttentionInterface()["sdpa"]

    def seeing(module, query, key, value, attention_mask, **options):
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        logits = query.detach().double() @ key.detach().double().mT * scaling
        if attention_mask is not None:
            logits = logits + attention_mask
        elif module.is_causal:
            past = torch.ones_like(logits, dtype=torch.bool).tril()
            logits = logits.masked_fill(~past, -math.inf)
        found.append((query.dtype, attention_entropy(logits.softmax(-1)).mean((0, 2))))
        return native(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("seeing", seeing)
    AttentionMaskInterface.register("seeing", AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation("seeing")
    return found


def seen_rows(probs, batch, model):
    """Rows that see a key: all but a causal model's left padding."""
    seen = torch.ones(probs.shape[:-1], dtype=torch.bool)
    if "attention_mask" in batch and model.config.model_type == "gpt2":
        seen &= batch["attention_mask"].cumsum(1)[:, None].bool()
    return seen


CASES = [(t, False) for t in MODEL_TYPES] + [("gpt2", True), ("bert", True)]


@pytest.mark.parametrize(("model_type", "padded"), CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_entropy_equals_eager_probabilities(model_type, padded, training):
    model = lively_model(model_type).train(training)
    batch = padded_batch(model) if padded else tiny_batch(model)
    with probe(model) as records:
        model(**batch)
    probabilities = eager_probabilities(model, batch)
    assert len(records.entropy) == len(probabilities) == len(records.entropy_normalised)
    for layer, probs in zip(records.entropy, probabilities, strict=True):
        rows = attention_entropy(probs)
        rows[~seen_rows(probs, batch, model)] = math.nan
        got = records.entropy[layer]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, rows.nanmean((0, 2)), atol=1e-5, rtol=0)
        keys = (probs > 1e-20).sum(-1)
        share = (rows / keys.log()).masked_fill(keys < 2, math.nan)
        normalised = records.entropy_normalised[layer]
        torch.testing.assert_close(normalised, share.nanmean((0, 2)), atol=1e-5, rtol=0)
        assert ((normalised >= 0) & (normalised <= 1)).all()
    # Something other than uniform attention was measured.
    assert min(share.min() for share in records.entropy_normalised.values()) < 0.97


@pytest.mark.parametrize("native", ["sdpa", "eager"])
@pytest.mark.parametrize(("model_type", "padded"), CASES)
def test_outputs_and_gradients_are_bit_identical(model_type, padded, native):
    dropout = {
        "gpt2": dict(attn_pdrop=0.1, resid_pdrop=0.1),
        "swin": dict(attention_probs_dropout_prob=0.1, drop_path_rate=0.1),
    }.get(model_type, dict(attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1))
    model = lively_model(model_type, **dropout)
    model.set_attn_implementation(native)
    batch = padded_batch(model) if padded else tiny_batch(model)
    torch.manual_seed(0)
    expected = run(model, batch)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with probe(model, queries=3, maps="all") as records:
        assert_same_tensors(run(model, batch), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert records.entropy
    torch.manual_seed(1)
    assert not torch.equal(run(model, batch)[0], expected[0])  # dropout was on


@pytest.mark.parametrize(
    ("model_type", "native"),
    [(t, "eager") for t in MODEL_TYPES]
    # The others do not support flex attention in transformers.
    + [pytest.param(t, "flex_attention", marks=pytest.mark.slow) for t in ("vit", "bert")],
)
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
def test_other_kernels_give_the_same_records(model_type, native):
    model = lively_model(model_type).eval()
    batch = padded_batch(model) if model_type in ("gpt2", "bert") else tiny_batch(model)
    with torch.no_grad(), probe(model) as expected:
        model(**batch)
    model.set_attn_implementation(native)
    with torch.no_grad():
        plain = model(**batch).logits
        with probe(model) as records:
            assert torch.equal(model(**batch).logits, plain)
    # Rows without a key come out differently, and with them norms over all tokens.
    assert_same_records(records, expected, terms=("entropy", "entropy_normalised", *WEIGHT_TERMS))


# The fifteen terms.


def two_norm(matrix):
    return torch.linalg.matrix_norm(matrix.double(), 2).float()


def block_weights(model, name):
    """(out, in) weights and head count of a block, read off by hand."""
    block = model.get_submodule(name)
    if model.config.model_type == "gpt2":
        wq, wk, wv = block.attn.c_attn.weight.T.chunk(3)
        mlp, heads = (block.mlp.c_fc.weight.T, block.mlp.c_proj.weight.T), block.attn.num_heads
        return (wq, wk, wv, block.attn.c_proj.weight.T, *mlp), heads, (block.ln_1, block.ln_2)
    if model.config.model_type == "bert":
        own = block.attention.self
        rest = (block.attention.output.dense, block.intermediate.dense, block.output.dense)
        layers = (own.query, own.key, own.value, *rest)
        norms = (block.attention.output.LayerNorm, block.output.LayerNorm)
        return [m.weight for m in layers], own.num_attention_heads, norms
    own = block.attention
    layers = (own.q_proj, own.k_proj, own.v_proj, own.o_proj, block.mlp.fc1, block.mlp.fc2)
    norms = (block.layernorm_before, block.layernorm_after)
    return [m.weight for m in layers], own.num_attention_heads, norms


def test_fifteen_terms_equal_their_definitions(model_type):
    model = lively_model(model_type)
    with probe(model) as records:
        model(**tiny_batch(model)).loss.backward()
    for layer in records.entropy:
        (wq, wk, wv, wo, w1, w2), heads, norms = block_weights(model, layer)
        got = {term: getattr(records, term)[layer] for term in FIFTEEN}
        expected = {
            "sigma_wq": two_norm(wq), "sigma_wk": two_norm(wk), "sigma_wv": two_norm(wv),
            "sigma_wo": two_norm(wo), "sigma_w1": two_norm(w1), "sigma_w2": two_norm(w2),
            "sigma_w2w1": two_norm(w2 @ w1),
            "norm_gamma1": norms[0].weight.norm(), "norm_beta1": norms[0].bias.norm(),
            "norm_gamma2": norms[1].weight.norm(), "norm_beta2": norms[1].bias.norm(),
        }  # fmt: skip
        products = [q.T @ k for q, k in zip(wq.chunk(heads), wk.chunk(heads), strict=True)]
        expected["sigma_qk"] = torch.stack([two_norm(p) for p in products])
        expected["sigma_ov"] = torch.stack(
            [two_norm(o @ v) for o, v in zip(wo.chunk(heads, 1), wv.chunk(heads), strict=True)]
        )
        for term, value in expected.items():
            # sigma1(W2 W1) is certain to 1e-4 by its own estimate; the others to rounding.
            rtol = 2e-4 if term == "sigma_w2w1" else 1e-5
            torch.testing.assert_close(got[term], value.detach(), rtol=rtol, atol=1e-6, msg=term)
        spectra = torch.stack([torch.linalg.svdvals(p)[: len(wq) // heads] for p in products])
        energy = spectra.square().detach()
        torch.testing.assert_close(records.sec[layer], energy[:, :4].sum(1) / energy.sum(1))
        torch.testing.assert_close(records.stable_rank[layer], energy.sum(1) / energy[:, 0])
        most = energy[records.sec[layer].argmax()]
        sizes = [s for s in (1, 2, 4, 8, 16) if s <= len(most)]
        shares = torch.stack([most[:s].sum() / most.sum() for s in sizes])
        torch.testing.assert_close(records.sec_curve[layer], shares)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "new", "reentrant"])
def test_token_norms_are_those_of_the_hidden_states(model_type, checkpointing):
    model = lively_model(model_type)
    batch = tiny_batch(model)
    blocks = []
    kept = {}
    with probe(model, terms=["entropy"]) as records:
        model(**batch)
    for name in records.entropy:
        module = model.get_submodule(name)
        blocks.append(name)

        def keep(module, args, kwargs, name=name):
            kept[name] = args[0] if args else kwargs["hidden_states"]
            kept[name].retain_grad()

        module._hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    model(**batch).loss.backward()
    for name in blocks:
        model.get_submodule(name)._hook.remove()
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
        model.enable_input_require_grads() if model_type in ("gpt2", "bert") else None
    with probe(model) as records:
        model(**batch).loss.backward()
    for name in blocks:
        torch.testing.assert_close(records.norm_x[name], kept[name].norm().detach())
        torch.testing.assert_close(records.norm_dx[name], kept[name].grad.norm())
        assert records.nonfinite_x[name] == records.nonfinite_dx[name] == 0
    assert list(records.norm_dx) == blocks


def test_checkpointing_does_not_record_twice(model_type):
    model = lively_model(model_type)
    batch = tiny_batch(model)
    with probe(model) as expected:
        model(**batch).loss.backward()
    for reentrant in (False, True):
        enable_checkpointing(model, reentrant)
        calls = []
        with probe(model) as records:
            handle = attention_calls(model, calls)
            model(**batch).loss.backward()
        handle()
        assert len(calls) >= 2 * len(records.entropy)  # recomputation did happen
        assert_same_records(records, expected, atol=1e-7, rtol=1e-6)


def enable_checkpointing(model, reentrant):
    """By its new name where transformers has it: the old one warns."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def attention_calls(model, calls):
    """Count the calls of attention's output projection; return what stops the counting."""
    ends = ("c_proj", "o_proj", "attention.output.dense")
    hooks = [
        m.register_forward_pre_hook(lambda m, args: calls.append(m))
        for n, m in model.named_modules()
        if n.endswith(ends) and "mlp" not in n
    ]
    return lambda: [hook.remove() for hook in hooks]


# Patched models.


def test_patched_models_are_measured_by_their_effective_weights(model_type):
    plain, patched = lively_model(model_type), lively_model(model_type)
    patch(patched, "sigma_reparam")
    sgd_steps(patched, lr=0.1)
    for _, layer in sigma_layers(patched):
        layer.gamma.data *= 1.1
    with probe(patched) as records:
        patched(**tiny_batch(patched)).loss.backward()
    with probe(plain) as untrained:
        plain(**tiny_batch(plain)).loss.backward()
    layer = next(iter(records.sigma_wq))
    assert (records.sigma_wq[layer] / untrained.sigma_wq[layer] - 1).abs() > 0.01
    fold(patched)
    with probe(patched) as folded:
        patched(**tiny_batch(patched)).loss.backward()
    # Folding rounds each weight once; the Lanczos estimate of sigma_w2w1 stops at 1e-4.
    assert_same_records(records, folded, atol=1e-5, rtol=3e-4)


def test_norms_that_were_removed_are_missing():
    model = tiny_model("vit")
    patch(model, ["sigma_reparam", "remove_pre_layernorm"])
    with probe(model) as records:
        model(**tiny_batch(model)).loss.backward()
    assert records.norm_gamma1 == records.norm_beta2 == {}
    assert len(records.norm_x) == len(records.sigma_qk) == 2


def test_rms_norms_give_thirteen_terms_and_key_heads_are_shared():
    model = tiny_llama()
    batch = {"input_ids": torch.arange(1, 13)[None], "labels": torch.arange(1, 13)[None]}
    with probe(model) as records:
        model(**batch).loss.backward()
    assert records.norm_beta1 == records.norm_beta2 == {}
    assert sum(bool(getattr(records, term)) for term in FIFTEEN) == 13
    layer = "model.layers.0"
    own, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    sigmas = [
        two_norm(q.T @ own.k_proj.weight.chunk(2)[head // 2])
        for head, q in enumerate(own.q_proj.weight.chunk(4))
    ]
    torch.testing.assert_close(records.sigma_qk[layer], torch.stack(sigmas).detach())
    largest = max(two_norm(mlp.gate_proj.weight), two_norm(mlp.up_proj.weight))
    torch.testing.assert_close(records.sigma_w1[layer], largest.detach())
    for probs, got in zip(eager_probabilities(model, batch), records.entropy.values(), strict=True):
        torch.testing.assert_close(got, attention_entropy(probs).nanmean((0, 2)))


def tiny_llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


def test_entropy_bound_lies_below_the_entropy(model_type):
    for strength in (0.2, 1.0, 10.0):
        model = tiny_model(model_type)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * strength * torch.randn_like(parameter)
            elif "embed" not in name and "wte" not in name:
                parameter.data *= strength
        with probe(model) as records:
            model(**tiny_batch(model))
        for layer, bound in records.entropy_bound.items():
            assert (bound >= 0).all()
            assert (bound <= records.entropy[layer] + 1e-6).all()
        if strength == 0.2:  # and it is not simply zero
            assert all((b > 1.0).all() for b in records.entropy_bound.values())


# Maps and modes.


def test_maps_of_chosen_heads_are_the_eager_ones(model_type):
    model = lively_model(model_type).eval()
    batch = tiny_batch(model)
    with torch.no_grad(), probe(model, maps=[1]) as records:
        model(**batch)
    for maps, probs in zip(records.maps.values(), eager_probabilities(model, batch), strict=True):
        torch.testing.assert_close(maps, probs[:1, 1], atol=1e-6, rtol=0)


def test_maps_are_those_of_the_first_forward_whatever_the_terms():
    model = lively_model("vit").eval()
    with torch.no_grad(), probe(model, terms=["norm_x"], maps="all") as records:
        for seed in (1, 2):
            model(**tiny_batch(model, seed=seed))
    with torch.no_grad(), probe(model, maps="all") as first:
        model(**tiny_batch(model, seed=1))
    assert_same_records(records, first, terms=("maps",), atol=0, rtol=0)
    assert records.rank == {}


def test_long_maps_are_subsampled():
    model = lively_model("gpt2", n_positions=300).eval()
    ids = torch.randint(1, 37, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), probe(model, maps="all") as records:
        model(ids)
    for maps in records.maps.values():
        assert maps.shape == (2, MAP_SIZE, MAP_SIZE)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, MAP_SIZE))
        assert maps.triu(1).abs().max() == 0  # still causal
    for mode in records.mode.values():
        assert set(mode) <= {"normal", "benign", "malignant"}


def test_modes_of_models_made_to_collapse():
    model = tiny_model("vit")
    attention = model.vit.layers[0].attention
    x = torch.zeros(16)
    x[0] = 1.0
    # Queries that are all the same pick one key; the largest wins altogether.
    attention.q_proj.weight.data.zero_()
    attention.q_proj.bias.data.fill_(1e4)
    attention.k_proj.weight.data.normal_()
    with probe(model) as records:
        model(**tiny_batch(model))
    first, second = records.mode
    assert records.mode[first] == ["malignant", "malignant"]
    assert records.mode[second] == ["normal", "normal"]
    assert (records.rank[first] < 0.15).all()
    assert (records.entropy[first] < 0.1).all()


# A run that does not notice.


def test_previous_implementation_is_back_also_after_an_exception(model_type):
    model = tiny_model(model_type)
    config, hooks = model.config, count_hooks(model)
    with pytest.raises(RuntimeError, match="stop"), probe(model):
        model(**tiny_batch(model))
        assert model.config is not config
        raise RuntimeError("stop")
    assert model.config is config
    assert all(m.config is config for m in model.modules() if hasattr(m, "config"))
    assert config._attn_implementation == "sdpa"
    assert count_hooks(model) == hooks
    with pytest.raises(Exception), probe(model):  # noqa: B017  (an error inside the forward)
        model(nonsense=1)
    with probe(model) as records:
        model(**tiny_batch(model))
    assert records.entropy


def count_hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_models_that_share_a_config_do_not_switch_each_other():
    first = tiny_model("gpt2")
    second = transformers.GPT2LMHeadModel(first.config)
    assert second.config is first.config
    batch = tiny_batch(first)
    with probe(first) as records:
        assert second.config._attn_implementation == "sdpa"
        second(**batch)
        assert records.entropy == {}
        with probe(second) as others:
            second(**batch)
        assert others.entropy
        assert records.entropy == {}
        first(**batch)
    assert records.entropy
    assert first.config is second.config


def test_a_config_may_hold_what_cannot_be_copied():
    model = tiny_model("gpt2")
    model.config.held = threading.Lock()
    with probe(model) as records:
        model(**tiny_batch(model))
        assert model.config.held is not None
    assert records.entropy


def test_configs_within_configs_are_private_too_and_stay_one():
    model = build("clip")
    both = model.config
    text = both.text_config
    with observing_attention(model):
        assert model.config.text_config is model.text_model.config is not text
        assert text._attn_implementation == "sdpa"
        assert model.config.text_config._attn_implementation == PREFIX + "sdpa"
    assert model.config is both and both.text_config is text is model.text_model.config


def test_a_probe_does_not_nest_on_one_model():
    model = tiny_model("gpt2")
    with probe(model) as records:
        with pytest.raises(RuntimeError, match="probed already"), probe(model):
            pass
        model(**tiny_batch(model))
    assert records.entropy


def test_forwards_are_averaged_and_nothing_outside_the_block_is_recorded():
    model = lively_model("gpt2")
    batches = [tiny_batch(model, seed=seed) for seed in (1, 2)]
    single = []
    for batch in batches:
        with probe(model) as records:
            model(**batch).loss.backward()
        single.append(records)
    with probe(model) as both:
        for batch in batches:
            model(**batch).loss.backward()
    for term in ("entropy", "norm_x", "norm_dx"):
        for layer, value in getattr(both, term).items():
            mean = (getattr(single[0], term)[layer] + getattr(single[1], term)[layer]) / 2
            torch.testing.assert_close(value, mean)
    with probe(model) as late:
        loss = model(**batches[0]).loss
    before = late.to_dict()
    loss.backward()
    model(**batches[1])
    assert late.to_dict() == before
    assert late.norm_dx == {}


def test_generation_steps_are_skipped():
    model = lively_model("gpt2").eval()
    ids = torch.randint(1, 37, (2, 6), generator=torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **options)
    with torch.no_grad(), probe(model) as prompt:
        model(ids)
    with probe(model) as records:
        assert torch.equal(model.generate(ids, **options), expected)
    assert_same_records(records, prompt, terms=("entropy", "entropy_normalised"))


def test_sampled_queries():
    model = lively_model("gpt2")
    batch = tiny_batch(model)
    results = []
    for generator in (None, None, torch.Generator().manual_seed(3)):
        with probe(model, queries=4, generator=generator) as records:
            model(**batch)
        results.append(records.to_dict())
    with probe(model) as exact:
        model(**batch)
    assert results[0]["entropy"] == results[1]["entropy"]
    assert results[0]["entropy"] != results[2]["entropy"]
    for layer, sampled in results[0]["entropy"].items():
        assert sampled != exact.entropy[layer].tolist()


def test_autocast_leaves_the_measures_in_float32(model_type):
    model = lively_model(model_type)
    batch = tiny_batch(model)
    with probe(model) as expected:
        model(**batch)
    seen = exact_entropies(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), probe(model) as records:
        model(**batch).loss.backward()
    assert_same_records(records, expected, terms=WEIGHT_TERMS, atol=0, rtol=1e-6)
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    for (layer, value), (_, exact) in zip(records.entropy.items(), seen, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, atol=2e-6, rtol=0)
        # In float32 activations are others: eight bits are seen.
        assert (value - expected.entropy[layer]).abs().max() > 1e-4
    assert all(torch.isfinite(v).all() for v in records.norm_dx.values())


def test_non_finite_values_are_counted_and_do_no_harm():
    model = tiny_model("vit")
    model.vit.layers[0].mlp.fc2.bias.data[3] = math.inf
    with probe(model) as records:
        model(**tiny_batch(model)).loss.backward()
    first, second = records.nonfinite_x
    assert records.nonfinite_x[first] == 0
    assert records.nonfinite_x[second] == 4 * 5  # batch x tokens, one feature
    assert records.nonfinite_dx[first] == 4 * 5 * 16  # all of it: every token sees the infinite one
    assert records.mode[second] == ["undefined", "undefined"]
    text = json.dumps(records.to_dict(), allow_nan=False)
    assert json.loads(text)["norm_x"][second] is None
    model.vit.layers[1].attention.q_proj.weight.data[0, 0] = math.nan
    with probe(model) as records:
        model(**tiny_batch(model))
    assert records.sigma_wq[second].isnan()
    assert records.sigma_qk[second].isnan().tolist() == [True, False]


def test_single_weights_are_tracked_when_they_move(monkeypatch):
    monkeypatch.setattr("hf_stable.monitor.block_terms.EXACT_SVD_MAX_DIM", 4)
    model = lively_model("vit")
    for step in range(4):
        with probe(model) as records:
            model(**tiny_batch(model))
        for layer in records.sigma_wq:
            (wq, *_, w1, w2), _, _ = block_weights(model, layer)
            for term, weight in (("sigma_wq", wq), ("sigma_w1", w1), ("sigma_w2w1", w2 @ w1)):
                got = getattr(records, term)[layer]
                torch.testing.assert_close(got, two_norm(weight), rtol=1e-3, atol=0)
        if step == 1:  # a wholly new weight: the old vectors are worthless
            for p in model.parameters():
                p.data = torch.randn_like(p)
        else:
            sgd_steps(model, steps=1, lr=0.01)


# torch.compile, wrappers, other architectures, bad input.


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_keep_their_graph(fullgraph):
    torch._dynamo.reset()
    model = lively_model("vit")
    batch = {"pixel_values": tiny_batch(model)["pixel_values"]}
    executed = []

    def backend(graph, inputs):
        def execute(*args):
            executed.append(graph)
            return graph.forward(*args)

        return execute

    def executed_graphs():
        executed.clear()
        compiled(**batch).logits.square().mean().backward()
        return list(executed)

    with probe(model) as expected:
        model(**batch).logits.square().mean().backward()
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    (graph,) = executed_graphs()
    for _ in range(2):
        with probe(compiled) as records:
            assert executed_graphs() == []
        assert_same_records(records, expected)
        assert executed_graphs() == [graph]


def test_other_architectures_have_their_attention_measured(own_registry):
    del registry._registry["llama"]
    model = tiny_llama()
    ids = torch.arange(1, 13)[None]
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*pass terms=\['entropy'"):
        with probe(model, terms=["entropy", "sigma_qk"]):
            pass
    assert model.config._attn_implementation == "sdpa"
    with pytest.warns(UserWarning, match="entropy, .*mode are recorded; .*sigma_qk.* left out"):
        with probe(model) as records:
            model(ids)
    assert set(records.to_dict()) == set(ATTENTION_TERMS)  # what can be measured, and no more
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        with probe(model):
            model(ids)
    with probe(model, terms=ATTENTION_TERMS) as records:
        model(ids)
    assert list(records.entropy) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for probs, got in zip(
        eager_probabilities(model, {"input_ids": ids}), records.entropy.values(), strict=True
    ):
        torch.testing.assert_close(got, attention_entropy(probs).nanmean((0, 2)))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "adapters"])
def test_a_head_that_runs_the_decoder_of_its_base_directly_is_seen(wrapped):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=37, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    ids = torch.arange(3, 15)[None]
    probabilities = eager_probabilities(model, {"input_ids": ids})
    enable_checkpointing(model, False)
    outer = model.train()
    if wrapped:
        peft = pytest.importorskip("peft")
        outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], r=2))
    with probe(outer, terms=ATTENTION_TERMS) as records:
        outer(input_ids=ids, labels=ids).loss.backward()
    assert len(records.entropy) == len(probabilities) == 2
    for probs, got in zip(probabilities, records.entropy.values(), strict=True):
        torch.testing.assert_close(got, attention_entropy(probs).nanmean((0, 2)))


def test_a_forward_of_which_nothing_is_seen_is_warned_of():
    model, ids = tiny_llama(), torch.arange(1, 13)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with probe(model, terms=ATTENTION_TERMS):
            pass
        with probe(model, terms=["entropy"]):
            model(ids)
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    names = r"not seen.*: model.layers.0.self_attn, model.layers.1.self_attn \(it goes past"
    with pytest.warns(UserWarning, match=names) as seen:
        for _ in range(2):
            with probe(model, terms=ATTENTION_TERMS) as records:
                model(ids)
    assert records.to_dict() == {} and len(seen) == 1
    # Attention of which nothing but its absence can be told.
    for layer in model.model.layers:
        layer.self_attn = Mixer()
    with pytest.warns(UserWarning, match="none of its attention was seen"):
        with probe(model, terms=ATTENTION_TERMS):
            model(ids)


class Mixer(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def test_only_the_terms_asked_for_are_recorded(model_type):
    model = tiny_model(model_type)
    for terms in (["entropy"], ["sigma_qk", "norm_dx"], ["mode"], ["entropy_bound"]):
        with probe(model, terms=terms) as records:
            model(**tiny_batch(model)).loss.backward()
        assert list(records.to_dict()) == sorted(terms, key=ALL_TERMS.index)
    with probe(model, terms="default") as records:
        model(**tiny_batch(model)).loss.backward()
    assert "sigma_w1" not in records.to_dict()
    assert {"entropy", "sec", "norm_dx"} <= records.to_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(terms=["entropy", "entorpy"]), "unknown term 'entorpy'"),
        (dict(terms="some"), "terms must be"),
        (dict(terms=None), "terms must be"),
        (dict(queries=0), "queries must be"),
        (dict(queries=True), "queries must be"),
        (dict(maps=[2]), r"maps=\[2\]: the model has 2 heads in a layer, 0 to 1"),
        (dict(maps=True), "maps is .all. or a list of heads"),
    ],
)
def test_bad_options_are_named_before_anything_changes(options, message):
    model = tiny_model("gpt2")
    config = model.config
    with pytest.raises(ValueError, match=message), probe(model, **options):
        pass
    assert model.config is config


def test_models_that_cannot_be_observed_say_so():
    with pytest.raises(UnsupportedModelError, match="holds no transformers model"):
        with probe(nn.Linear(2, 2)):
            pass
    model = tiny_model("gpt2", reorder_and_upcast_attn=True)
    model.set_attn_implementation("eager")
    for asked in (dict(terms=["entropy"]), dict(maps="all")):
        with pytest.raises(UnsupportedModelError, match="reorder_and_upcast_attn"):
            with probe(model, **asked):
                pass
    assert model.config._attn_implementation == "eager"
    with pytest.warns(UserWarning, match="sigma_qk.* are recorded; entropy, .*reorder_and_upcast"):
        with probe(model) as records:
            model(**tiny_batch(model)).loss.backward()
    assert {"sigma_qk", "norm_dx"} <= records.to_dict().keys()
    assert not records.to_dict().keys() & set(ATTENTION_TERMS)

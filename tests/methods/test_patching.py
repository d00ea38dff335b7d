"""patch, fold and describe on whole models: the same function, refusals that change nothing."""

from __future__ import annotations

import copy
import inspect
import re
import warnings

import pytest
import torch
import torch.distributed as dist
import transformers
from tiny_models import add_adapter, sgd_steps, tiny_batch, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import prune

import hf_stable
from hf_stable import SigmaReparamConfig, UnsupportedModelError
from hf_stable.methods.patching import patch_configs
from hf_stable.methods.sigma_reparam.layers import SigmaLayer
from hf_stable.methods.sigma_reparam.steps import live_layers

NUM_LAYERS = {"gpt2": 8, "vit": 13, "swin": 26, "bert": 13}
"""Layers that the tiny models have, their heads not counted."""


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, SigmaLayer)]


def logits(model, size=4, training=False):
    batch = tiny_batch(model, size=size)
    batch.pop("labels")
    if model.config.model_type in ("gpt2", "bert"):
        batch["input_ids"] = batch["input_ids"][:, : 12 if size > 1 else 3]
    return model.train(training)(**batch).logits


def everything(model):
    """State, classes, parameters, hooks and plain attributes of a model, to compare."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "identities": [(name, id(p)) for name, p in model.named_parameters()],
        "modules": [(name, id(m), type(m)) for name, m in model.named_modules()],
        "attributes": [(name, sorted(m.__dict__)) for name, m in model.named_modules()],
        "hooks": [
            (name, key, list(value))
            for name, m in model.named_modules()
            for key, value in m.__dict__.items()
            if "hooks" in key and value
        ],
        "live": [layer.serial_number for layer in live_layers()],
    }


def assert_untouched(before, after):
    for part in before.keys() - {"state"}:
        assert before[part] == after[part], part
    assert list(before["state"]) == list(after["state"])
    for name, value in before["state"].items():
        assert torch.equal(value.nan_to_num(7.0), after["state"][name].nan_to_num(7.0)), name


# The function of the model


@pytest.mark.parametrize("heads", ["skip", "include"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no grad"])
def test_init_spectral_changes_no_bit(model_type, heads, training, with_grad):
    plain = tiny_model(model_type)
    patched = hf_stable.patch(copy.deepcopy(plain), "sigma_reparam", heads=heads)
    assert len(layers_of(patched)) >= NUM_LAYERS[model_type]
    with torch.set_grad_enabled(with_grad):
        assert torch.equal(logits(patched, training=training), logits(plain, training=training))
        for layer in layers_of(patched):
            layer.gamma.data.mul_(1.01)
        assert not torch.equal(logits(patched, training=training), logits(plain, training=training))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_init_spectral_on_other_precisions(model_type, dtype):
    """In bfloat16, where few tokens have their outputs scaled, the bias is one rounding off."""
    plain = tiny_model(model_type).to(dtype)
    patched = hf_stable.patch(copy.deepcopy(plain), "sigma_reparam")
    if model_type in ("gpt2", "bert"):
        output, expected = logits(patched, size=1), logits(plain, size=1)
    else:
        batch = {"pixel_values": tiny_batch(plain, size=1)["pixel_values"].to(dtype)}
        with torch.no_grad():
            output, expected = patched.eval()(**batch).logits, plain.eval()(**batch).logits
    assert output.dtype == dtype
    # Some roundings on the way through two blocks, of outputs about 1.
    torch.testing.assert_close(output, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_init_one_is_another_function(model_type):
    plain = tiny_model(model_type)
    patched = hf_stable.patch(copy.deepcopy(plain), "sigma_reparam", init="one")
    assert not torch.allclose(logits(patched), logits(plain), rtol=1e-2, atol=1e-3)
    for layer in layers_of(patched):
        assert (layer.gamma == 1).all()
        blocks = layer.effective_weight().flatten(1).chunk(layer.num_parts, layer.parts.dim)
        for block in blocks:
            assert torch.linalg.svdvals(block)[0].item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("init", ["spectral", "one"])
@pytest.mark.parametrize("fused_qkv", ["split", "joint"])
def test_merge_contract(model_type, init, fused_qkv):
    """plain == patched, trained differs, folded == trained, and no sigma layer is left."""
    model = tiny_model(model_type)
    plain = logits(model).detach()
    weights = {name: id(p) for name, p in model.named_parameters()}
    hf_stable.patch(model, "sigma_reparam", init=init, fused_qkv=fused_qkv)
    assert torch.equal(logits(model), plain) == (init == "spectral")
    model.train()
    sgd_steps(model, steps=3, lr=0.05)
    trained = logits(model).detach()
    assert not torch.allclose(trained, plain, rtol=1e-2, atol=1e-3)
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}

    assert hf_stable.fold(model) is model
    assert not layers_of(model) and not hf_stable.is_patched(model)
    assert {name: id(p) for name, p in model.named_parameters()} == weights
    # Scaling the weight and scaling the product round apart; logits are about 1.
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
    stored = model.state_dict()
    assert any(not torch.equal(raw[name], stored[name]) for name in weights)
    assert type(model).config_class.model_type == model_type
    assert hf_stable.fold(model) is model  # a plain model comes back as it is


def test_folding_at_once_gives_every_bit_back(model_type):
    model = tiny_model(model_type)
    before = everything(model)
    hf_stable.patch(model, "sigma_reparam", heads="include")
    assert everything(model)["modules"] != before["modules"]
    hf_stable.fold(model)
    after = everything(model)
    for part in before.keys() - {"attributes", "live"}:
        assert after[part] == before[part] if part != "state" else True, part
    assert_untouched({"state": before["state"]}, {"state": after["state"]})


def test_folded_and_patched_again(model_type):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam", init="one")
    sgd_steps(model)
    trained = logits(model).detach()
    hf_stable.patch(hf_stable.fold(model), "sigma_reparam")
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
    sgd_steps(model)
    assert not torch.allclose(logits(model), trained, rtol=1e-2, atol=1e-3)


def test_generate_gives_the_tokens_of_the_folded_model():
    model = tiny_model("gpt2", initializer_range=0.5)
    plain = copy.deepcopy(model).eval()
    hf_stable.patch(model, "sigma_reparam", init="one")
    sgd_steps(model, lr=0.05)
    model.eval()
    folded = hf_stable.fold(copy.deepcopy(model))
    prompt = tiny_batch(model, size=2)["input_ids"][:, :4]

    def tokens(of, **kwargs):
        torch.manual_seed(0)
        return of.generate(prompt, max_new_tokens=20, eos_token_id=None, **kwargs).tolist()

    for kwargs in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3}):
        assert tokens(model, **kwargs) == tokens(folded, **kwargs)
        assert tokens(model, **kwargs) != tokens(plain, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "vit"])
def test_a_compiled_model_equals_eager_and_is_compiled_once(model_type):
    eager = hf_stable.patch(tiny_model(model_type), "sigma_reparam", init="one")
    model = copy.deepcopy(eager)
    compiled = torch.compile(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (eager, model)]
    batches = [tiny_batch(eager, seed=seed) for seed in range(4)]

    def step(run, optimizer, batch):
        optimizer.zero_grad()
        loss = run(**batch).logits.square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    for batch in batches:
        batch.pop("labels")
    first = [step(*pair, batches[0]) for pair in zip((eager, compiled), optimizers, strict=True)]
    assert first[1] == pytest.approx(first[0], rel=1e-5)
    before = [layer.sigma.clone() for layer in layers_of(model)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in batches[1:]:
            losses = [
                step(*pair, batch) for pair in zip((eager, compiled), optimizers, strict=True)
            ]
            assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        with pytest.raises(RuntimeError, match="recompile"):  # which it would tell
            step(compiled, optimizers[1], {name: value[:1] for name, value in batch.items()})
    for layer, other, old in zip(layers_of(model), layers_of(eager), before, strict=True):
        torch.testing.assert_close(layer.sigma, other.sigma, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.gamma, other.gamma, rtol=1e-4, atol=1e-5)
        assert not torch.equal(layer.sigma, old)


@pytest.mark.slow
def test_a_model_compiled_before_the_patch_follows_it():
    """The model itself shows no trace of the wrapper; torch sees that the layers changed."""
    model = tiny_model("vit").eval()
    compiled = torch.compile(model, backend="eager")
    pixels = {"pixel_values": tiny_batch(model)["pixel_values"]}
    plain = compiled(**pixels).logits
    hf_stable.patch(model, "sigma_reparam", init="one")
    torch.testing.assert_close(compiled(**pixels).logits, model(**pixels).logits)
    assert not torch.allclose(compiled(**pixels).logits, plain, rtol=1e-2)


# Which layers


def test_include_and_exclude_are_globs():
    def names(**options):
        model = hf_stable.patch(tiny_model("vit"), "sigma_reparam", **options)
        return {name for name, m in model.named_modules() if isinstance(m, SigmaLayer)}

    everything_else = names()
    attention = names(include=["*.attention.*"])
    assert attention == {name for name in everything_else if ".attention." in name} != set()
    assert names(exclude=["*.attention.*"]) == everything_else - attention
    assert names(include=["*.layers.0.*"], exclude=["*.mlp.*", "*.o_proj"]) == {
        f"vit.layers.0.attention.{part}_proj" for part in "qkv"
    }
    assert names(heads="include", include=["classifier"]) == {"classifier"}


def test_tied_heads_are_skipped_and_reported(model_type):
    tied = {
        "gpt2": ("lm_head", "tied to transformer.wte.weight"),
        "bert": ("cls.predictions.decoder", "tied to bert.embeddings.word_embeddings.weight"),
    }
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam", heads="include")
    skipped = {row.name: row.skipped for row in hf_stable.describe(model).layers if row.skipped}
    assert skipped == dict([tied[model_type]] if model_type in tied else [])
    if model_type in tied:
        free = tiny_model(model_type, tie_word_embeddings=False)
        hf_stable.patch(free, "sigma_reparam", heads="include")
        assert isinstance(free.get_submodule(tied[model_type][0]), SigmaLayer)


def test_weights_that_a_user_ties_are_skipped_and_reported():
    model = tiny_model("vit")
    first, second = (layer.mlp for layer in model.vit.layers)
    second.fc1.weight = first.fc1.weight
    report = hf_stable.describe(hf_stable.patch(model, "sigma_reparam"))
    rows = {row.name: row for row in report.layers}
    assert rows["vit.layers.0.mlp.fc1"].skipped == "tied to vit.layers.1.mlp.fc1.weight"
    assert rows["vit.layers.1.mlp.fc1"].skipped == "tied to vit.layers.0.mlp.fc1.weight"
    assert rows["vit.layers.0.mlp.fc2"].skipped is None
    assert type(first.fc1) is type(second.fc1) is nn.Linear


def test_the_same_config_again_changes_nothing(model_type):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam", init="one")
    sgd_steps(model)
    before = everything(model)
    assert hf_stable.patch(model, SigmaReparamConfig(init="one")) is model
    assert_untouched(before, everything(model))


def test_ways_to_name_a_method():
    config = SigmaReparamConfig(init="one", exclude=["*.mlp.*"])
    for method in (config, [config], (config,)):
        model = hf_stable.patch(tiny_model("vit"), method)
        assert patch_configs(model) == (config,)
    by_name = hf_stable.patch(tiny_model("vit"), "sigma_reparam", init="one", exclude=["*.mlp.*"])
    assert patch_configs(by_name) == (config,)
    assert SigmaReparamConfig.from_dict(config.to_dict()) == config


def test_a_config_with_an_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match=r"unknown option 'innit' .*\(did you mean 'init'\?\)"):
        SigmaReparamConfig(innit="one")
    with pytest.raises(TypeError, match=r"unknown option 'scop' .*\(did you mean 'scope'\?\)"):
        hf_stable.RemovePreLayerNormConfig(scop="all")
    assert list(inspect.signature(SigmaReparamConfig).parameters)[0] == "init"


def test_is_patched():
    model = tiny_model("vit")
    assert not hf_stable.is_patched(model)
    assert hf_stable.is_patched(hf_stable.patch(model, "sigma_reparam"))
    assert hf_stable.is_patched(nn.Sequential(model))  # inside a wrapper of the user's
    assert not hf_stable.is_patched(hf_stable.fold(model))


# The report


def test_the_report_prints_as_a_table():
    model = tiny_model("gpt2")
    hf_stable.patch(model, "sigma_reparam", exclude=["*.1.*", "*.mlp.*"])
    attention = model.transformer.h[0].attn
    parts = " ".join(f"{value:.4g}" for value in attention.c_attn.sigma.tolist())
    out = f"{attention.c_proj.sigma.item():.4g}"
    expected = """
        GPT2LMHeadModel: 2 of 9 layers patched by SigmaReparamConfig(init='spectral', \
        fused_qkv='split', heads='skip', include=None, exclude=('*.1.*', '*.mlp.*'), \
        power_iterations=1)
        layer kind shape sigma gamma
        transformer.h.0.attn.c_attn SigmaConv1D 16x48 PARTS PARTS
        transformer.h.0.attn.c_proj SigmaConv1D 16x16 OUT OUT
        transformer.h.0.mlp.c_fc Conv1D 16x64 skipped: in exclude
        transformer.h.0.mlp.c_proj Conv1D 64x16 skipped: in exclude
        transformer.h.1.attn.c_attn Conv1D 16x48 skipped: in exclude
        transformer.h.1.attn.c_proj Conv1D 16x16 skipped: in exclude
        transformer.h.1.mlp.c_fc Conv1D 16x64 skipped: in exclude
        transformer.h.1.mlp.c_proj Conv1D 64x16 skipped: in exclude
        lm_head Linear 37x16 skipped: tied to transformer.wte.weight
    """.replace("PARTS", parts).replace("OUT", out)
    text = str(hf_stable.describe(model))
    assert text.split() == expected.split()
    lines = text.splitlines()
    assert len(lines) == 11 and all(line == line.rstrip() for line in lines)
    columns = {
        line.index(word) for line, word in zip(lines[2:4], ("SigmaConv1D",) * 2, strict=True)
    }
    assert columns == {lines[1].index("kind")}


def test_the_report_of_a_plain_model_and_of_a_trained_one():
    model = tiny_model("vit")
    report = hf_stable.describe(model)
    assert report.num_patched == 0
    assert {row.skipped for row in report.layers} == {"the model is not patched"}
    assert "0 of 14 layers patched" in str(report)
    hf_stable.patch(model, "sigma_reparam", init="one")
    sgd_steps(model)
    for row in hf_stable.describe(model).layers:
        module = model.get_submodule(row.name)
        assert row.shape == tuple(module.weight.shape)
        if row.skipped is None:
            assert row.gamma == tuple(module.gamma.tolist()) and row.gamma != (1.0,)
            assert row.sigma == tuple(module.sigma.tolist())


@pytest.mark.parametrize(
    "head", [nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3)), nn.Dropout()], ids=["mlp", "dropout"]
)
def test_a_head_that_was_replaced_is_reported_and_left_alone(head):
    model = tiny_model("vit")
    model.classifier = head
    for report in (
        hf_stable.describe(model),
        hf_stable.describe(hf_stable.patch(model, "sigma_reparam")),
    ):
        row = report.layers[-1]
        assert (row.name, row.kind, row.shape) == ("classifier", type(head).__name__, ())
        assert row.skipped == "has no weight" and "skipped: has no weight" in str(report)
    assert report.num_patched == 13 and model.classifier is head


# Refusals. Each leaves the model exactly as it was


def zeroed(model):
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.weight.zero_()
    return model


def poisoned(value):
    def poison(model):
        with torch.no_grad():
            model.vit.layers[1].mlp.fc2.weight[1, 2] = value
        return model

    return poison


def subclassed(model):
    class MyLinear(nn.Linear):
        pass

    model.vit.layers[1].mlp.fc2.__class__ = MyLinear
    return model


def with_another_head(model):
    model.classifier = nn.Sequential(nn.Linear(16, 3))
    return model


def same(model):
    return model


ERRORS = {  # what is done to a ViT, the arguments of patch, the error, a part of its message
    "unknown method": (
        same, ("sigma_reparm",), {}, ValueError,
        "unknown method 'sigma_reparm' (did you mean 'sigma_reparam'?); the methods are sigma_rep",
    ),
    "unknown method, nothing near": (
        same, ("xyz",), {}, ValueError, "unknown method 'xyz'; the methods are sigma_reparam",
    ),
    "unknown option": (
        same, ("sigma_reparam",), {"innit": "one"}, ValueError,
        "unknown option 'innit' of sigma_reparam (did you mean 'init'?); its options are init, fu",
    ),
    "unknown choice": (
        same, ("sigma_reparam",), {"init": "spectrl"}, ValueError,
        "init='spectrl' is not allowed (did you mean 'spectral'?); choose one of 'spectral', 'one'",
    ),
    "unknown choice of fused_qkv": (
        same, ("sigma_reparam",), {"fused_qkv": True}, ValueError, "fused_qkv=True is not allowed",
    ),
    "no power iteration": (
        same, ("sigma_reparam",), {"power_iterations": 0}, ValueError,
        "power_iterations=0 is not allowed; give an integer >= 1",
    ),
    "power iterations that are no number": (
        same, ("sigma_reparam",), {"power_iterations": True}, ValueError,
        "power_iterations=True is not allowed",
    ),
    "pattern that is no sequence": (
        same, ("sigma_reparam",), {"include": "*.mlp.*"}, TypeError,
        "include takes a sequence of glob patterns, got '*.mlp.*'",
    ),
    "number for patterns": (
        same, ("sigma_reparam",), {"include": 3}, TypeError,
        "include takes a sequence of glob patterns, got 3",
    ),
    "pattern that is a number": (
        same, ("sigma_reparam",), {"exclude": ["*.mlp.*", 3]}, TypeError,
        "exclude takes a sequence of glob patterns, got ['*.mlp.*', 3]",
    ),
    "no pattern": (
        same, ("sigma_reparam",), {"include": []}, ValueError,
        "no layer left to patch with include=(), exclude=None, heads='skip'; the patterns",
    ),
    "options beside a config": (
        same, (SigmaReparamConfig(),), {"init": "one"}, TypeError,
        "options by keyword go with a method's name, not with a config",
    ),
    "no method": (same, ([],), {}, TypeError, "a non-empty sequence of them, got []"),
    "a method that is none": (same, (3,), {}, TypeError, "got 3"),
    "a method twice": (
        same, (["sigma_reparam", SigmaReparamConfig()],), {}, ValueError,
        "each method may be named once, got sigma_reparam, sigma_reparam",
    ),
    "include that matches nothing": (
        same, ("sigma_reparam",), {"include": ["vit.layers.0.mlp.fc9"]}, ValueError,
        "include pattern 'vit.layers.0.mlp.fc9' matches no layer (did you mean 'vit.layers.0.",
    ),
    "exclude that matches nothing": (
        same, ("sigma_reparam",), {"exclude": ["*.mpl.*"]}, ValueError,
        "exclude pattern '*.mpl.*' matches no layer",
    ),
    "nothing left": (
        same, ("sigma_reparam",), {"exclude": ["*"]}, ValueError,
        "no layer left to patch with include=None, exclude=('*',), heads='skip'; the patterns are "
        "matched against names such as 'vit.embeddings.patch_embeddings.projection'",
    ),
    "only a head left": (
        same, ("sigma_reparam",), {"include": ["classifier"]}, ValueError,
        "heads='skip'; 'classifier' is skipped, a head (heads='include' patches it); the patterns",
    ),
    "head that was replaced": (
        with_another_head, ("sigma_reparam",), {"heads": "include"}, TypeError,
        "cannot reparametrise classifier of type torch.nn.modules.container.Sequential; allowed",
    ),
    "zero matrix": (
        zeroed, ("sigma_reparam",), {}, ValueError,
        "cannot reparametrise vit.layers.1.mlp.fc2: its (16, 32) weight has an all-zero part, so "
        "gamma / sigma is 0 / 0; initialise it or exclude the layer",
    ),
    "NaN": (
        poisoned(float("nan")), ("sigma_reparam",), {}, ValueError,
        "cannot reparametrise vit.layers.1.mlp.fc2: a (16, 32) matrix has NaN or infinite entries",
    ),
    "infinity": (
        poisoned(float("inf")), ("sigma_reparam",), {}, ValueError, "NaN or infinite entries",
    ),
    "subclass of Linear": (
        subclassed, ("sigma_reparam",), {}, TypeError,
        "MyLinear; allowed are exactly Linear, Conv1D and Conv1d to Conv3d (a subclass, a "
        "quantised layer or an adapter may use its weight in ways that gamma / sigma would break; "
        "an entry declares one that does not by plain_layers). To patch the others, exclude it",
    ),
    "sigma_reparam with another that fails": (
        same, (["sigma_reparam", "remove_layernorm"],), {}, UnsupportedModelError,
        "remove_layernorm does not fit: ViTForImageClassification is pre-LN",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "args", "options", "kind", "text"), ERRORS.values(), ids=ERRORS)
def test_error_table(spoil, args, options, kind, text):
    model = spoil(tiny_model("vit"))
    before = everything(model)
    with pytest.raises(kind, match=re.escape(text)):
        hf_stable.patch(model, *args, **options)
    assert not hf_stable.is_patched(model)
    assert_untouched(before, everything(model))


def test_a_tied_head_alone_leaves_nothing_and_says_why():
    with pytest.raises(
        ValueError, match=r"; 'lm_head' is skipped, tied to transformer\.wte\.weight; the patterns"
    ):
        hf_stable.patch(tiny_model("gpt2"), "sigma_reparam", include=["lm_head"], heads="include")


def test_another_config_is_refused_and_names_both():
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    sgd_steps(model)
    before = everything(model)
    with pytest.raises(
        ValueError,
        match=r"patched already, with SigmaReparamConfig\(init='spectral'.*to patch it with "
        r"SigmaReparamConfig\(init='one'.*, undo that first \(hf_stable\.fold\)",
    ):
        hf_stable.patch(model, "sigma_reparam", init="one")
    assert_untouched(before, everything(model))


# States of a model that cannot be patched, each the real one


def compiled_wrapper(model, tmp_path):
    return torch.compile(model, backend="eager")


def compiled_in_place(model, tmp_path):
    model.compile(backend="eager")
    return model


def data_parallel(model, tmp_path):
    return DataParallel(model)


def on_meta(model, tmp_path):
    return model.to("meta")


def built_on_meta(model, tmp_path):
    with torch.device("meta"):
        return type(model)(model.config)


def built_in_inference_mode(model, tmp_path):
    with torch.inference_mode():
        return type(model)(model.config)


def with_adapters(model):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():  # PEFT reads a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def peft_model(model, tmp_path):
    return with_adapters(model)


def peft_base_model(model, tmp_path):
    with_adapters(model)
    return model


def adapter_of_transformers(model, tmp_path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        add_adapter(model, peft.LoraConfig(target_modules=["q_proj"]))
    return model


def quantised_by_transformers(model, tmp_path):
    model.config.quantization_config = transformers.BitNetQuantConfig().to_dict()
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert "BitLinear" in {type(module).__name__ for module in model.modules()}
    return model


def pruned(model, tmp_path):
    prune.l1_unstructured(model.vit.layers[0].mlp.fc1, "weight", amount=0.5)
    return model


def weight_normed(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model.vit.layers[1].mlp.fc2)
    return model


STATES = {
    "pruned": (pruned, "the weight of 'vit.layers.0.mlp.fc1' is no parameter: pruning"),
    "weight_norm": (weight_normed, "the weight of 'vit.layers.1.mlp.fc2' is no parameter"),
    "torch.compile": (compiled_wrapper, "is wrapped in torch.compile already"),
    "model.compile": (compiled_in_place, "is wrapped in torch.compile already"),
    "DataParallel": (data_parallel, "is wrapped in DataParallel already"),
    "moved to meta": (on_meta, "is on the meta device and has no values to take a spectrum of"),
    "built on meta": (built_on_meta, "is on the meta device"),
    "built in inference mode": (
        built_in_inference_mode,
        "was made under torch.inference_mode(), and no training can use it, patched or not",
    ),
    "PeftModel": (peft_model, "the model has PEFT adapters: their merge would edit the raw"),
    "base of a PeftModel": (peft_base_model, "hf_stable.fold, then add the adapters"),
    "add_adapter": (adapter_of_transformers, "the model has PEFT adapters"),
    "quantised": (quantised_by_transformers, "the model is quantised"),
}


@pytest.mark.parametrize(("prepare", "text"), STATES.values(), ids=STATES)
def test_states_that_are_refused(prepare, text, tmp_path):
    model = prepare(tiny_model("vit"), tmp_path)
    before = [(name, id(m), type(m)) for name, m in model.named_modules()]
    keys = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=re.escape(text)):
        hf_stable.patch(model, "sigma_reparam")
    assert [(name, id(m), type(m)) for name, m in model.named_modules()] == before
    assert list(model.state_dict()) == keys and not hf_stable.is_patched(model)


def test_inference_mode_is_refused_and_no_grad_is_not():
    model = tiny_model("vit")
    with torch.inference_mode(), pytest.raises(UnsupportedModelError, match="Call it outside"):
        hf_stable.patch(model, "sigma_reparam")
    assert not hf_stable.is_patched(model)
    with torch.no_grad():
        hf_stable.patch(model, "sigma_reparam")
    logits(model).square().sum().backward()
    assert model.vit.layers[0].mlp.fc1.gamma.grad.abs() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_quantised_by_torch_are_refused():
    model = torch.ao.quantization.quantize_dynamic(tiny_model("vit"), {nn.Linear})
    with pytest.raises(TypeError, match=r"of type torch\.ao\.nn\.quantized\.dynamic.*allowed are"):
        hf_stable.patch(model, "sigma_reparam")
    assert not hf_stable.is_patched(model)


@pytest.fixture
def single_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_in_ddp_is_refused_by_either_name(single_process_group):
    model = tiny_model("vit")
    ddp = DistributedDataParallel(model)
    for target in (ddp, model):
        with pytest.raises(UnsupportedModelError, match="wrapped in DistributedDataParallel"):
            hf_stable.patch(target, "sigma_reparam")
    assert not hf_stable.is_patched(ddp)
    other = tiny_model("vit")  # one beside it is no concern of the wrapper's
    assert hf_stable.is_patched(hf_stable.patch(other, "sigma_reparam"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sharded_model_is_refused_and_a_patched_one_can_be_sharded(single_process_group):
    sharded = fully_shard(tiny_model("vit"))
    with pytest.raises(
        UnsupportedModelError, match=r"sharded by FSDP2 already.* call hf_stable.patch before"
    ):
        hf_stable.patch(sharded, "sigma_reparam")
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    expected = logits(model).detach()
    fully_shard(model)
    assert isinstance(layers_of(model)[0].gamma, DTensor)
    torch.testing.assert_close(logits(model), expected)
    sgd_steps(model, steps=1)


def test_adapters_come_after_folding():
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam", init="one")
    sgd_steps(model)
    expected = logits(model).detach()
    with pytest.raises(ValueError, match="fold"):
        with_adapters(model)
    adapted = with_adapters(hf_stable.fold(model))
    torch.testing.assert_close(logits(adapted.base_model.model), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trained = logits(adapted.base_model.model).detach()
    assert not torch.allclose(trained, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda model: hf_stable.patch(model, "sigma_reparam"), hf_stable.fold, hf_stable.describe,
        hf_stable.refresh, hf_stable.restore_layernorms, hf_stable.parameter_groups,
        hf_stable.lora_groups, lambda model: hf_stable.probe(model).__enter__(),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_by_its_value(function):
    with pytest.raises(TypeError, match="takes a model itself, .* got 'openai-community/gpt2'"):
        function("openai-community/gpt2")


def test_an_optimizer_that_is_given_a_model_says_what_to_give():
    with pytest.raises(TypeError, match=r"the model Linear: give hf_stable.parameter_groups"):
        hf_stable.AdamW2(nn.Linear(2, 2))

"""Exported folders, used by transformers alone; the rounding of weights; what stays behind."""

from __future__ import annotations

import ast
import copy
import importlib
import json

import pytest
import torch
import transformers
from contract_models import SAME
from exported_cases import ALL, METHODS, export_case, patched, run_script
from PIL import Image
from safetensors.torch import load_file
from tiny_models import MODEL_TYPES, sgd_steps, tiny_batch, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

import hf_stable
from hf_stable import modeling_hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.checkpoints.exporting import plain_copy
from hf_stable.checkpoints.saved_models import load_saved
from hf_stable.methods.sigma_reparam.method import sigma_layers
from hf_stable.methods.sigma_reparam.steps import live_layers

PIPELINES = [
    ("text-generation", "gpt2", "GPT2LMHeadModel"),
    ("text-classification", "gpt2", "GPT2ForSequenceClassification"),
    ("token-classification", "gpt2", "GPT2ForTokenClassification"),
    ("image-classification", "vit", "ViTForImageClassification"),
    ("image-classification", "swin", "SwinForImageClassification"),
    ("fill-mask", "bert", "BertForMaskedLM"),
    ("text-classification", "bert", "BertForSequenceClassification"),
    ("token-classification", "bert", "BertForTokenClassification"),
]


def tiny_processor(model):
    side = model.config.image_size
    return transformers.ViTImageProcessorPil(size={"height": side, "width": side})


def pipeline_case(folder, task, model_type, head, method):
    """Export a model with its processor, and run its pipeline here first."""
    images = task == "image-classification"
    model = patched(model_type, head, method, **({"num_channels": 3} if images else {}))
    processor = tiny_processor(model) if images else tiny_tokenizer()
    identity = f"{task}-{head}-{method}"
    hf_stable.export(model, folder / identity, processing_class=processor)
    given = "w1 [MASK] w3" if task == "fill-mask" else "w1 w2 w3"
    options = dict(max_new_tokens=4, do_sample=False) if task == "text-generation" else {}
    part = {"image_processor" if images else "tokenizer": processor}
    pipe = transformers.pipeline(task, model=model, **part)
    expected = pipe(Image.new("L", (8, 8), 100) if images else given, **options)
    return {
        "id": identity,
        "folder": str(folder / identity),
        "task": task,
        "standalone": method != "sigma",
        "text": given,
        "options": options,
        "expected": json.loads(json.dumps(expected, default=float)),
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What transformers alone makes of every exported folder, by the id of the case."""
    folder = tmp_path_factory.mktemp("exports")
    cases = [export_case(folder, *each) for each in ALL]
    cases += [pipeline_case(folder, *each, method) for each in PIPELINES for method in METHODS]
    results = run_script(folder, cases)
    for case in cases:
        results[case["id"]]["expected"] = case.get("expected")
    return results


@pytest.mark.slow
@pytest.mark.xdist_group("exported")
@pytest.mark.parametrize(("model_type", "head", "method"), ALL, ids=lambda value: value)
def test_transformers_alone_uses_the_folder(outcomes, model_type, head, method):
    assert outcomes[f"{head}-{method}"]["error"] is None


@pytest.mark.slow
@pytest.mark.xdist_group("exported")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("task", "model_type", "head"), PIPELINES, ids=lambda value: value)
def test_pipelines_of_transformers_alone_use_the_folder(outcomes, task, model_type, head, method):
    outcome = outcomes[f"{task}-{head}-{method}"]
    assert outcome["error"] is None
    # Scores of a folded model are rounded elsewhere; ranks, tokens and labels are the same.
    assert flat(outcome["result"]) == pytest.approx(flat(outcome["expected"]), rel=1e-4)
    assert labels(outcome["result"]) == labels(outcome["expected"]) != []


def flat(result):
    return [v for row in result for v in row.values() if isinstance(v, int | float)]


def labels(result):
    return [v for row in result for v in row.values() if isinstance(v, str)]


def test_every_head_class_of_the_first_architectures_is_tested():
    tested = {head for _, head, _ in ALL}
    for model_type in MODEL_TYPES:
        module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        public = {
            name for name in module.__all__ if not name.endswith(("PreTrainedModel", "Layer"))
        }
        assert public <= tested


def test_the_modeling_file_imports_transformers_and_what_it_needs_only():
    tree = ast.parse(open(modeling_hf_stable.__file__).read())
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    roots = {name.partition(".")[0] for name in imported}
    of_python = {"__future__", "collections", "dataclasses", "re", "typing"}
    assert roots == of_python | {"transformers", "packaging", "torch"}


def test_a_folder_of_folded_weights_has_nothing_of_hf_stable(model_type, tmp_path):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam")
    sgd_steps(model)
    hf_stable.export(model, tmp_path)
    names = {file.name for file in tmp_path.iterdir()} - {"generation_config.json"}
    assert names == {"README.md", "config.json", "model.safetensors"}
    tiny_model(model_type).save_pretrained(tmp_path / "plain")
    plain, exported = (load_file(f / "model.safetensors") for f in (tmp_path / "plain", tmp_path))
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in plain.items()}
    assert "hf_stable" not in (tmp_path / "config.json").read_text()


def test_torch_export_takes_the_plain_model(model_type, tmp_path):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam")
    sgd_steps(model)
    hf_stable.export(model, tmp_path)
    plain = load_saved(tmp_path).eval()
    inputs = {k: v for k, v in tiny_batch(plain).items() if k != "labels"}
    options = {"return_dict": False} | ({"use_cache": False} if model_type == "gpt2" else {})
    program = torch.export.export(plain, (), kwargs=inputs | options)
    with torch.no_grad():
        got = program.module()(**inputs, **options)[0]
        torch.testing.assert_close(got, plain(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_the_model_stays_as_it_is(model_type, tmp_path):
    model = hf_stable.patch(tiny_model(model_type), ["sigma_reparam"])
    sgd_steps(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = len(live_layers())
    hf_stable.export(model, tmp_path, dtype=torch.bfloat16)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert hf_stable.is_patched(model) and len(live_layers()) == live
    assert sgd_steps(model)


def test_a_copy_takes_memory_only_for_what_folding_changes():
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    copied = plain_copy(model)
    folded = {f"{name}.weight" for name, _ in sigma_layers(model)}
    own = dict(model.named_parameters())
    shared = {n for n, p in copied.named_parameters() if p.data_ptr() == own[n].data_ptr()}
    assert shared == {n for n, _ in copied.named_parameters()} - folded
    assert copied.lm_head.weight is copied.transformer.wte.weight
    assert not hf_stable.is_patched(copied)


# Rounding


def exact_weights(model):
    """gamma / sigma * W of every sigma layer, in float64."""
    return {
        f"{name}.weight": (layer.gamma / layer.sigma).double() * layer.weight.double()
        for name, layer in sigma_layers(model)
    }


def errors(exported, exact):
    """The relative rounding errors of all weights in one vector."""
    state = exported.state_dict()
    parts = [((state[name].double() - w) / w).abs().flatten() for name, w in exact.items()]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_before_the_cast_rounds_once_where_casting_first_rounds_twice(dtype, tmp_path):
    model = hf_stable.patch(tiny_model("vit", hidden_size=64), "sigma_reparam")
    sgd_steps(model)
    with torch.no_grad():
        for _, layer in sigma_layers(model):
            layer.weight += 0.1 * layer.weight.sign()  # clear of float16's subnormal numbers
            layer.gamma *= 1.1  # or gamma / sigma is 1 and casting first would round once too
        hf_stable.export(model, tmp_path / "once", dtype=dtype)
        exact = exact_weights(model)
        once = errors(load_saved(tmp_path / "once"), exact)
        hf_stable.export(model.to(dtype), tmp_path / "twice")
        twice = errors(load_saved(tmp_path / "twice"), exact)
    half_ulp = torch.finfo(dtype).eps / 2
    # The product in float32 is off by float32's own rounding before it is cast.
    assert once.max() <= half_ulp + 4 * torch.finfo(torch.float32).eps
    assert twice.max() > 1.5 * half_ulp
    assert twice.mean() > 1.2 * once.mean()


def test_the_folder_says_which_dtype_it_holds(tmp_path):
    model = patched("gpt2", "GPT2LMHeadModel", "sigma_no_norms")
    hf_stable.export(model, tmp_path, dtype=torch.bfloat16)
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    loaded = load_saved(tmp_path)
    assert loaded.dtype == loaded.config.dtype == torch.bfloat16
    assert model.dtype == torch.float32


def test_low_precision_weights_go_out_in_full_precision_unrounded(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam").to(torch.bfloat16)
    with torch.no_grad():
        for _, layer in sigma_layers(model):
            layer.gamma *= 1.1
        hf_stable.export(model, tmp_path, dtype=torch.float32)
        assert errors(load_saved(tmp_path), exact_weights(model)).max() < 1e-6


# What is refused, and what does not go out


def test_shards_are_those_of_transformers(tmp_path):
    model = patched("bert", "BertForMaskedLM", "sigma_no_norms")
    hf_stable.export(model, tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {file.name for file in tmp_path.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 1
    loaded = load_saved(tmp_path)
    with torch.no_grad():
        batch = tiny_batch(model)
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, **SAME)


@pytest.mark.parametrize("write", [hf_stable.export, PreTrainedModel.save_pretrained])
@pytest.mark.parametrize("method", ["sigma", "sigma_no_norms"])
@pytest.mark.parametrize("sizes", [("50GB", "5KB"), ("5KB", "50GB")], ids=["split", "joined"])
def test_weights_of_an_earlier_save_in_other_files_do_not_stay(write, method, sizes, tmp_path):
    earlier = patched("vit", "ViTForImageClassification", method)
    write(earlier, tmp_path, max_shard_size=sizes[0])
    model = copy.deepcopy(earlier)
    with torch.no_grad():
        model.classifier.weight.mul_(2)
    write(model, tmp_path, max_shard_size=sizes[1])
    names = {file.name for file in tmp_path.glob("model*")} - {"modeling_hf_stable.py"}
    assert ("model.safetensors" in names) == (sizes[1] == "50GB")
    assert (len(names) == 1) == (sizes[1] == "50GB")
    # Found by transformers as it finds weights, which prefers the one file.
    state = load_saved(tmp_path).state_dict()
    torch.testing.assert_close(state["classifier.weight"], model.classifier.weight.detach())
    assert not torch.equal(state["classifier.weight"], earlier.classifier.weight)


def test_a_sidecar_of_an_earlier_save_does_not_stay(tmp_path):
    model = patched("vit", "ViTForImageClassification", "sigma_no_norms")
    model.save_pretrained(tmp_path)
    assert (tmp_path / SIDECAR_FILE).is_file()
    hf_stable.export(model, tmp_path)
    assert not list(tmp_path.glob("hf_stable_state*"))


def test_a_wrapper_is_refused(tmp_path):
    model = patched("vit", "ViTForImageClassification", "sigma")
    with pytest.raises(TypeError, match="DataParallel is no model of transformers"):
        hf_stable.export(torch.nn.DataParallel(model), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT's own
def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("gpt2"), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    with pytest.raises(TypeError, match="merge_and_unload"):
        hf_stable.export(model, tmp_path)


@pytest.mark.parametrize(
    "content", [b"---\nlicense: [mit\n---\n", b"---\n- mit\n---\n", "---\n---\nß".encode("latin-1")]
)
def test_a_broken_card_in_the_folder_is_refused_before_anything_is_written(content, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=r"README\.md is there already and is no model card"):
        hf_stable.export(patched("vit", "ViTForImageClassification", "sigma"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_bytes() == content


def test_a_file_in_the_place_of_the_folder_is_named_and_kept(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(OSError, match=r"cannot save the model to '.*mine': .*choose a directory"):
        hf_stable.export(tiny_model("gpt2"), tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "kept"

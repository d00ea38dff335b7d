"""Every architecture, head class and method, exported, with what the model computed before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import tiny_model

import hf_stable
from hf_stable.methods.layernorms.standalone import AUTO_CLASSES

HEADS = {
    "gpt2": (
        "GPT2Model",
        "GPT2LMHeadModel",
        "GPT2DoubleHeadsModel",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2ForQuestionAnswering",
    ),
    "vit": ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"),
    "swin": (
        "SwinModel",
        "SwinForImageClassification",
        "SwinForMaskedImageModeling",
        "SwinBackbone",
    ),
    "bert": (
        "BertModel",
        "BertForPreTraining",
        "BertLMHeadModel",
        "BertForMaskedLM",
        "BertForNextSentencePrediction",
        "BertForSequenceClassification",
        "BertForMultipleChoice",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
    ),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "ViTForMaskedImageModeling": dict(encoder_stride=4),
    "BertLMHeadModel": dict(is_decoder=True),
}

REMOVAL = {name: "remove_pre_layernorm" for name in ("gpt2", "vit", "swin")} | {
    "bert": "remove_layernorm"
}

METHODS = ("sigma", "no_norms_in_blocks", "sigma_no_norms")

ALL = [
    (model_type, head, method)
    for model_type, heads in HEADS.items()
    for head in heads
    for method in METHODS
]

SCRIPT = Path(__file__).parent / "scripts" / "use_exports.py"


def patched(model_type: str, head: str, method: str, **overrides: Any):
    """A patched model in evaluation mode whose weights and gamma have moved."""
    model = tiny_model(model_type, head, **OPTIONS.get(head, {}), **overrides)
    methods: list[Any] = []
    if "no_norms" in method:
        scope = "blocks" if method == "no_norms_in_blocks" else "all"
        config = {
            "remove_layernorm": hf_stable.RemoveLayerNormConfig,
            "remove_pre_layernorm": hf_stable.RemovePreLayerNormConfig,
        }[REMOVAL[model_type]]
        methods.append(config(scope=scope))
    if "sigma" in method:
        methods.append("sigma_reparam")
    hf_stable.patch(model, methods)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs_of(model, head: str) -> dict[str, torch.Tensor]:
    """Inputs for any head, with labels where they give a loss."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    if hasattr(config, "image_size"):
        side = config.image_size
        inputs = {"pixel_values": torch.randn(2, 1, side, side, generator=generator)}
    else:
        choices = (2,) if head in ("GPT2DoubleHeadsModel", "BertForMultipleChoice") else ()
        shape = (2, *choices, 7)
        inputs = {"input_ids": torch.randint(1, config.vocab_size, shape, generator=generator)}
    if head.endswith(("ImageClassification", "SequenceClassification")):
        inputs["labels"] = torch.tensor([0, 1])
    return inputs


def auto_class_of(model) -> str | None:
    """The auto class that loads the model's class from a folder, if there is one."""
    for name, table in AUTO_CLASSES.items():
        # AutoBackbone asks the Hub for a folder; the class itself is tested instead.
        found = getattr(transformers, table).get(type(model.config), None)
        classes = found if isinstance(found, tuple) else (found,)
        if type(model) in classes and name != "AutoBackbone":
            return name
    return None


def export_case(folder: Path, model_type: str, head: str, method: str) -> dict[str, Any]:
    """Export a model and describe to the script what to expect of the folder."""
    model = patched(model_type, head, method)
    identity = f"{head}-{method}"
    hf_stable.export(model, folder / identity)
    inputs = inputs_of(model, head)
    with torch.no_grad():
        outputs = flatten(model(**inputs).to_tuple())
    torch.save(inputs, folder / f"{identity}.in")
    torch.save(outputs, folder / f"{identity}.out")
    case = {
        "id": identity,
        "folder": str(folder / identity),
        "auto_class": auto_class_of(model),
        "native_class": head,
        "standalone": method != "sigma",
        "inputs": str(folder / f"{identity}.in"),
        "outputs": str(folder / f"{identity}.out"),
        # A folded weight is rounded once more than the product that a sigma layer takes.
        "tolerance": dict(rtol=1e-4, atol=1e-5) if "sigma" in method else dict(rtol=0, atol=0),
    }
    if head in ("GPT2LMHeadModel", "BertLMHeadModel"):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        made = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        case["tokens"] = made.tolist()
    return case


def flatten(values) -> list[torch.Tensor]:
    """All tensors of nested tuples, in order."""
    if isinstance(values, torch.Tensor):
        return [values]
    nested = [flatten(value) for value in values] if isinstance(values, tuple | list) else []
    return [tensor for part in nested for tensor in part]


def run_script(
    folder: Path, cases: list[dict[str, Any]], python: str | Path = sys.executable
) -> dict[str, Any]:
    """Let another process use the folders, and return what came of each case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    result = subprocess.run(
        [python, SCRIPT, folder / "cases.json", folder / "results.json"],
        capture_output=True,
        text=True,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())

"""Use exported folders with transformers alone. Needs no hf_stable, and must not import it.

Arguments: a JSON list of cases, and where to write what came of each. A case has `id`, `folder`,
`auto_class` (or None), `native_class`, `standalone` (true where LayerNorms are gone), `inputs` and
`outputs` (files of tensors), `tolerance`, and, for a language model, `tokens` that it generates.
A case that is `brief` is loaded once, whatever transformers says of its config.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from contextlib import contextmanager

import torch
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

noise: list[str] = []


class Listen(logging.Handler):
    def emit(self, record):
        noise.append(record.getMessage())


@contextmanager
def silence(case):
    """Fail if transformers logs a warning or anything warns."""
    noise.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = noise + [str(warning.message) for warning in caught]
    assert not said, said


def load(case, folder, **options):
    name = case["auto_class"]
    if name is None and case["standalone"]:
        reference = f"modeling_hf_stable.HfStable{case['native_class']}"
        loader = get_class_from_dynamic_module(reference, folder)
    else:
        loader = getattr(transformers, name or case["native_class"])
        if case["standalone"]:
            options.setdefault("trust_remote_code", True)
    return loader.from_pretrained(folder, **options)


def tensors(output):
    flat = []
    for value in output.to_tuple() if hasattr(output, "to_tuple") else output:
        if isinstance(value, torch.Tensor):
            flat.append(value)
        elif isinstance(value, tuple | list):
            flat += tensors(value)
    return flat


def same(model, case, **tolerance):
    with torch.no_grad():
        got = tensors(model.eval()(**torch.load(case["inputs"])))
    expected = torch.load(case["outputs"])
    assert len(got) == len(expected) > 0
    torch.testing.assert_close(got, expected, **tolerance)


def refuses(kind, text, call):
    try:
        call()
    except kind as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError(f"{text!r} was not raised")


def use_briefly(case):
    model, info = load(case, case["folder"], output_loading_info=True)
    assert not any(info.values()), info
    same(model, case, **case["tolerance"])
    assert type(model).__name__ == "HfStable" + case["native_class"]
    native = getattr(transformers, case["native_class"])
    text = "LayerNorms of this model were removed"
    refuses(Exception, text, lambda: native.from_pretrained(case["folder"]))


def use(case):
    if case.get("brief"):
        return use_briefly(case)
    tolerance = case["tolerance"]
    again = case["folder"] + "-again"
    with silence(case):
        model, info = load(case, case["folder"], output_loading_info=True)
        assert not any(info.values()), info
        same(model, case, **tolerance)
        if "tokens" in case:
            ids = torch.load(case["inputs"])["input_ids"]
            prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            made = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert made.tolist() == case["tokens"]
        model.save_pretrained(again)
        resaved, info = load(case, again, output_loading_info=True)
        assert not any(info.values()), info
        same(resaved, case, **tolerance)
    expected = ("HfStable" if case["standalone"] else "") + case["native_class"]
    assert type(model).__name__ == type(resaved).__name__ == expected
    if not case["standalone"]:
        return
    native = getattr(transformers, case["native_class"])
    for folder in (case["folder"], again):
        if case["auto_class"]:
            auto = getattr(transformers, case["auto_class"])
            refuses(ValueError, "trust_remote_code=True", lambda: auto.from_pretrained(folder))  # noqa: B023
        for options in ({}, {"ignore_mismatched_sizes": True}):
            refuses(
                Exception,
                "LayerNorms of this model were removed",
                lambda: native.from_pretrained(folder, **options),  # noqa: B023
            )


def use_in_pipeline(case):
    with silence(case):
        options = {"trust_remote_code": True} if case["standalone"] else {}
        pipe = transformers.pipeline(case["task"], model=case["folder"], **options)
        if case["task"] == "image-classification":
            from PIL import Image

            given = Image.new("L", (8, 8), 100)
        else:
            given = case["text"]
        return pipe(given, **case["options"])


def main(cases_file, results_file):
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.get_logger().addHandler(Listen(level=logging.WARNING))
    results = {}
    for case in json.load(open(cases_file)):
        try:
            results[case["id"]] = {
                "result": use_in_pipeline(case) if "task" in case else use(case),
                "error": None,
            }
        except Exception:
            results[case["id"]] = {"result": None, "error": traceback.format_exc()}
    assert "hf_stable" not in sys.modules
    json.dump(results, open(results_file, "w"), default=float)


if __name__ == "__main__":
    main(*sys.argv[1:])

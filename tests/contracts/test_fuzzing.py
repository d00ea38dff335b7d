"""Readers of what strangers made: whatever the bytes are, an answer or one clear error, in time.

Each reader gets inputs of the kinds that once broke it (`CORPUS`), and seeded mutations of good
ones. What it may raise is listed with it; anything else is a crash. About a minute in all.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
import warnings

import pytest
import torch
from report_runs import FALLING, alarm, calm, small_maps, write_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from trained_models import trained
from transformers import GPT2LMHeadModel

import hf_stable
from hf_stable.architectures.registry import UnsupportedModelError, architecture_of
from hf_stable.checkpoints.folding import fold_checkpoint
from hf_stable.commands.inspect.inspection import inspect_checkpoint
from hf_stable.commands.launch.options import read_options
from hf_stable.monitor.log_file import StabilityLog, read_log
from hf_stable.report import write_report
from hf_stable.report.reading import read_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LONGEST = 20.0
"""Seconds that one input may take."""

SIDECAR = "hf_stable_state.safetensors"

TOKENS = (
    b"1e999", b"-1", b"null", b"[]", b"{}", b'"\\ud800"', b"NaN", b"true", b"9" * 400, b"1e-320",
    b'""', b"[[[[", b"}", b"\x00", b"\xff\xfe", b"'", b'"a\\u001b[2J"', b"1000000000", b"\n",
)  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut, doubled, or put in place of others."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, length = draw.randrange(len(data) + 1), draw.randrange(1, 40)
        kind = draw.randrange(5)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length] * draw.randrange(1, 4)
        elif kind == 3:
            data[at : at + draw.randrange(8)] = draw.choice(TOKENS)
        else:
            del data[at:]
    return bytes(data)


def changed_json(content: object, draw: random.Random) -> object:
    """A value somewhere within plain data replaced by one of another kind."""
    values = (None, True, -1, 10**30, 1e308, "x", "\ud800", [], {}, [[1]], {"a": {}}, float("nan"))
    if isinstance(content, dict) and content and draw.random() < 0.9:
        key = draw.choice(list(content))
        return content | {key: changed_json(content[key], draw)}
    if isinstance(content, list) and content and draw.random() < 0.9:
        at = draw.randrange(len(content))
        return [*content[:at], changed_json(content[at], draw), *content[at + 1 :]]
    return draw.choice(values)


def survives(call, *allowed):
    """Call; return whether it answered. An error has to be one of those, and say something."""
    started = time.perf_counter()
    try:
        call()
        answered = True
    except allowed as error:
        assert str(error).strip(), f"{type(error).__name__} without a word"
        answered = False
    assert time.perf_counter() - started < LONGEST
    return answered


# Logs and states

LOG_CORPUS = {
    "deep nesting": b"[" * 100_000 + b"\n",
    "an object in objects": b'{"event": "probe", "quantities": ' + b'{"a": ' * 50_000 + b"\n",
    "a huge integer": b'{"event": "probe", "attempt": 0, "step": 1' + b"0" * 5000 + b"}\n",
    "no step": b'{"event": "probe", "attempt": 0}\n',
    "a kind that is a list": b'{"event": "alarm", "attempt": 0, "step": 1, "kind": ["a"]}\n',
    "a negative head": b'{"event": "alarm", "attempt": 0, "step": 1, "layer": "a", "head": -3}\n',
    "half a character": b'{"event": "alarm", "attempt": 0, "step": 1, "reason": "\\ud800"}\n',
    "Latin-1": b'{"event": "stop", "attempt": 0, "step": 1, "reason": "gr\xf6\xdfer"}\n',
    "infinity": b'{"event": "probe", "attempt": 0, "step": 1, "loss": 1e999, "quantities": {}}\n',
    "nulls": b"\x00" * 5000 + b"\n",
    "no end of a line": b'{"event": "probe"' + b" " * 200_000,
}


def feed_log(folder, content):
    (folder / "stability.jsonl").write_bytes(content)
    assert survives(lambda: read_log(folder), OSError)
    assert survives(lambda: write_report([folder], folder / "out.json", format="json"))
    assert survives(lambda: StabilityLog(folder).resume(0, 50))
    assert survives(lambda: read_log(folder))


@pytest.fixture
def run(tmp_path):
    probes = {step: calm(step) | small_maps() for step in (1, 50, 90)}
    return write_run(tmp_path / "run", FALLING, probes, [("alarm", 50, alarm())])


@pytest.mark.parametrize("content", LOG_CORPUS.values(), ids=LOG_CORPUS)
def test_logs_of_the_corpus(content, run):
    good = (run / "stability.jsonl").read_bytes()
    feed_log(run, good + content + good)


def test_mutated_logs(run):
    draw, good = random.Random(0), (run / "stability.jsonl").read_bytes()
    whole = 0
    for _ in range(250):
        content = mutated(good, draw)
        feed_log(run, content)
        whole += content == good
        (run / "stability.jsonl").write_bytes(content)
        whole += not read_run(run).notes
    assert 0 < whole < 250  # most of them were damaged, and it is said


def test_mutated_states_and_results(run, tmp_path):
    draw = random.Random(1)
    results = {"eval_accuracy": 0.9, "epoch": 1.0}
    config = {"architectures": ["ViTForImageClassification"], "id2label": {"0": "a", "1": "b"}}
    good = {"trainer_state.json": json.loads((run / "trainer_state.json").read_text()),
            "eval_results.json": results, "config.json": config}  # fmt: skip
    for number in range(300):
        for name, content in good.items():
            text = json.dumps(changed_json(content, draw)).encode()
            (run / name).write_bytes(mutated(text, draw) if number % 2 else text)
        format = draw.choice(("json", "csv", "html"))
        assert survives(lambda kind=format: write_report([run], tmp_path / "out", format=kind))


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "checkpoint"
    trained("gpt2").save_pretrained(folder)
    return folder


def feed_folder(folder, target, *, loads=True):
    """Whether a folder can be inspected, folded and, if that is asked for, loaded."""
    shutil.rmtree(target, ignore_errors=True)
    calls = [lambda: inspect_checkpoint(folder), lambda: fold_checkpoint(folder, target)]
    if loads:
        calls.append(lambda: hf_stable.load(GPT2LMHeadModel, folder))
    return [survives(call, ValueError, OSError) for call in calls]


def copied(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder)
    return folder


def test_the_good_checkpoint_is_read(checkpoint, tmp_path):
    assert feed_folder(copied(checkpoint, tmp_path), tmp_path / "out") == [True] * 3


def test_mutated_bytes_of_checkpoints(checkpoint, tmp_path):
    draw, refused = random.Random(2), 0
    for number in range(90):
        name = (SIDECAR, "model.safetensors", "config.json")[number % 3]
        folder = copied(checkpoint, tmp_path)
        content = (folder / name).read_bytes()
        # What is in front says what the rest is.
        head, rest = content[: 1 << 11], content[1 << 11 :]
        (folder / name).write_bytes(mutated(head, draw) + rest)
        # What transformers says of a config, or of weights that do not fit it, is its own.
        loads = name == SIDECAR
        refused += feed_folder(folder, tmp_path / "out", loads=loads).count(False)
    assert refused > 90


def test_sidecars_that_are_well_formed_and_wrong(checkpoint, tmp_path):
    """Shapes, dtypes and presence of gamma, u, v and sigma; fields of its metadata."""
    draw, refused = random.Random(3), 0
    good = load_file(checkpoint / SIDECAR)
    with safe_open(checkpoint / SIDECAR, "pt") as file:
        metadata = file.metadata()
    changes = (
        lambda t: t[:0], lambda t: t.reshape(-1)[:1], lambda t: t.unsqueeze(0), lambda t: t.half(),
        lambda t: torch.full_like(t, float("nan")), lambda t: t.to(torch.int32), lambda t: None,
        lambda t: torch.zeros(7, 3), lambda t: t.T.contiguous() if t.ndim == 2 else t * 1e30,
    )  # fmt: skip
    for number in range(60):
        folder, tensors, said = copied(checkpoint, tmp_path), dict(good), dict(metadata)
        if number % 3:
            name = draw.choice(list(tensors))
            changed = draw.choice(changes)(tensors.pop(name))
            if changed is not None:
                tensors[name] = changed
        else:
            key = draw.choice(list(said))
            try:
                said[key] = json.dumps(changed_json(json.loads(said[key]), draw))
            except ValueError:
                said[key] = draw.choice(("", "x", "[", "9" * 99))
        save_file(tensors, folder / SIDECAR, metadata=said)
        refused += feed_folder(folder, tmp_path / "out").count(False)
    assert refused > 20


CONFIGS = {
    "a billion layers": {"n_layer": 10**9},
    "a billion labels": {"num_labels": 10**9},
    "a width of nothing": {"n_embd": 0},
    "heads that are a text": {"n_head": "many"},
    "a kernel of the Hub": {"attn_implementation": "stranger/kernel"},
    "another kernel of the Hub": {"_attn_implementation": "stranger/kernel"},
    "code of the Hub": {"auto_map": {"AutoModelForCausalLM": "stranger/repo--code.Model"}},
    "a model_type that is a list": {"model_type": ["gpt2"]},
    "architectures that are a number": {"architectures": 7},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_configs_of_the_corpus(change, checkpoint, tmp_path):
    folder = copied(checkpoint, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    survives(lambda: inspect_checkpoint(folder), ValueError, OSError)
    survives(lambda: fold_checkpoint(folder, tmp_path / "out"), ValueError, OSError)


# Options

YAML_CORPUS = {
    "aliases of aliases": "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
        for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    ),
    "brackets in brackets": "patch: " + "[" * 5000 + "]" * 5000,
    "an object of Python": "patch: !!python/object/apply:os.system ['true']",
    "a document of many": "a: 1\n---\nb: 2\n",
    "a list": "- a\n- b\n",
    "nothing": "",
    "a number as a name": "7: 8\n",
    "a long value": "monitor: " + "9" * 60_000,
    "not a number": "monitor: .nan\n",
    "no UTF-8": "monitor: \udcff\n",
}  # fmt: skip

GOOD_OPTIONS = """\
patch: [sigma_reparam, remove_pre_layernorm]
patch_config:
  sigma_reparam: {init: one, exclude: ["*.mlp.c_fc"]}
  remove_pre_layernorm: {scope: blocks}
monitor: 2
terms: [entropy, sigma_qk]
thresholds: {entropy_share: 0.2}
on_collapse: stop
console: short
fold_at_end: true
"""


@pytest.mark.parametrize("text", YAML_CORPUS.values(), ids=YAML_CORPUS)
def test_options_of_the_corpus(text, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert not survives(lambda: read_options({}, path), ValueError, TypeError, OSError)


def test_mutated_options(tmp_path):
    draw, path, answered = random.Random(4), tmp_path / "options.yaml", 0
    for _ in range(1500):
        path.write_bytes(mutated(GOOD_OPTIONS.encode(), draw))
        answered += survives(lambda: read_options({}, path), ValueError, TypeError, OSError)
    assert 0 < answered < 1500


# Entries


def changed_entry(entry: object, draw: random.Random) -> object:
    """An entry with a field, or one of an entry within it, replaced."""
    names = [each.name for each in dataclasses.fields(entry) if each.name != "model_type"]
    name = draw.choice(names)
    value = getattr(entry, name)
    if dataclasses.is_dataclass(value) and draw.random() < 0.8:
        return dataclasses.replace(entry, **{name: changed_entry(value, draw)})
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        if draw.random() < 0.8:
            return dataclasses.replace(entry, **{name: (changed_entry(value[0], draw), *value[1:])})
    wrong = (None, "", "nowhere", "attn..c_attn", 7, ("a",), [], {}, "attn", "mlp.c_fc", b"x", ".")
    return dataclasses.replace(entry, **{name: draw.choice(wrong)})


def test_mutated_entries(own_registry):
    draw, model = random.Random(5), tiny_model("gpt2")
    entry, names = architecture_of(model), sorted(model.state_dict())
    refused = 0
    for _ in range(400):

        def register_and_patch():
            hf_stable.register_architecture(changed_entry(entry, draw), overwrite=True)
            hf_stable.patch(model, "sigma_reparam")
            hf_stable.fold(model)

        allowed = (UnsupportedModelError, ValueError, TypeError)
        refused += not survives(register_and_patch, *allowed)
        assert sorted(model.state_dict()) == names  # whether it was refused or not
    assert 100 < refused < 400


def test_the_corpus_would_be_missed_by_a_reader_that_trusts():
    """That the inputs are what they are called: plain readers do fail on them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("deep nesting", "nulls", "no end of a line", "a huge integer"):
            with pytest.raises((ValueError, RecursionError)):
                json.loads(LOG_CORPUS[name])

"""What every shipped entry owes to every method; the results are those of the support table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import transformers
from architecture_contract import CHECKS, RESULTS, exported, pinned, unpatched, versions
from contract_models import fresh
from packaging.specifiers import SpecifierSet
from tiny_architectures import MODELS
from torch import nn

import hf_stable
from hf_stable.architectures import registry
from hf_stable.architectures.coverage import find_uncovered
from hf_stable.architectures.finding import find_blocks, find_layers, find_norms

COMPOSITES = {  # entries for what joins models that have entries of their own
    "encoder-decoder", "gemma3", "llava", "speech-encoder-decoder", "vision-encoder-decoder",
    "vision-text-dual-encoder",
}  # fmt: skip

RECORDED = json.loads(RESULTS.read_text())

WRITE = "python tests/support/architecture_contract.py && python docs/tables.py"


def lacks(name):
    """Why the installed transformers leaves a model out; None where it does not."""
    needed = RECORDED.get(name, {}).get("transformers", "")
    if SpecifierSet(needed).contains(transformers.__version__, prereleases=True):
        return None
    return f"{name} needs transformers {needed}"


HERE = [name for name in MODELS if lacks(name) is None]


@pytest.fixture(params=MODELS)
def name(request):
    if reason := lacks(request.param):
        pytest.skip(reason)
    return request.param


def test_every_model_has_its_results():
    assert list(RECORDED) == list(MODELS), f"run: {WRITE}"
    for results in RECORDED.values():
        assert results["checks"].keys() == {*CHECKS, "export"}


@pytest.mark.slow
def test_every_shipped_entry_is_here():
    held = {part for each in HERE for part in types_in(each)}
    assert held | COMPOSITES == set(hf_stable.supported_architectures())


def types_in(name):
    model = fresh(name)
    return {
        module.config.model_type
        for module in model.modules()
        if isinstance(module, transformers.PreTrainedModel)
    }


def test_the_entry_fits_and_covers_the_model(name):
    model = fresh(name)
    assert len(find_blocks(model)) >= 1 and find_norms(model)
    named = {id(layer.weight) for layer in find_layers(model)}
    left = {each.name: each.reason for each in find_uncovered(model)}
    assert not [each for each, reason in left.items() if "does not name" in reason]
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for path, module in model.named_modules():
        if isinstance(module, plain) and id(module.weight) not in named:
            assert any(path.startswith(each) or each.startswith(path) for each in left), path


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_the_contract_has_the_results_of_the_table(name, check, tmp_path):
    assert CHECKS[check](name, tmp_path) == RECORDED[name]["checks"][check], f"run: {WRITE}"


@pytest.mark.slow
def test_what_is_patched_and_what_is_not_are_pinned(name):
    assert pinned(name) == RECORDED[name]["layers"]
    assert unpatched(name) == RECORDED[name]["left out"]
    assert versions(name) == RECORDED[name]["transformers"]


@pytest.mark.slow
def test_without_norms_every_model_loads_in_a_process_of_its_own(tmp_path):
    expected = {name: RECORDED[name]["checks"]["export"] for name in HERE}
    assert exported(HERE, tmp_path) == expected


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("check", ["patch", "probe", "AdamW2", "norms"])
def test_an_entry_that_does_not_fit_fails_its_contract(check, tmp_path):
    entry = registry._registry["opt"]
    blocks = [replace(block, mlp_out=("fc3",), pre_norms=("norm",)) for block in entry.blocks]
    hf_stable.register_architecture(replace(entry, block=tuple(blocks)), overwrite=True)
    with pytest.raises(hf_stable.UnsupportedModelError, match="entry for 'opt' names .*overwrite="):
        CHECKS[check]("opt", tmp_path)

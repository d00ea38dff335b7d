"""The larger sets of the evidence are ready to run: every set-up is of its size and takes steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes import data  # noqa: E402
from recipes.data import CONTEXT, Task  # noqa: E402
from recipes.evidence import larger, records  # noqa: E402
from recipes.evidence.claims import CLAIMS  # noqa: E402
from recipes.models import CLASSES, SMALL  # noqa: E402


def parameters(settings):
    """Of a model, without memory for its weights."""
    import torch

    config_class, model_class = CLASSES[settings.model]
    sizes = SMALL[settings.model] | settings.model_config
    sizes |= dict(vocab_size=1000) if settings.model == "gpt2" else dict(image_size=28)
    with torch.device("meta"):
        return sum(each.numel() for each in model_class(config_class(**sizes)).parameters())


def test_set_ups_have_the_sizes_that_they_are_said_to_have():
    for variants in larger.TEN_TIMES.values():
        assert all(3e6 < parameters(each.settings) < 5e6 for each in variants)
    sizes = {parameters(v.settings) for variants in larger.ON_GPU.values() for v in variants}
    small, gpt2 = sorted(sizes)
    assert 20e6 < small < 23e6 and 80e6 < gpt2 < 90e6
    tokens = {
        v.settings.steps * v.settings.batch_size * CONTEXT
        for v in larger.ON_GPU["1"]
        if v.settings.model == "gpt2"
    }
    assert all(abs(each - 10e6) < 1e5 for each in tokens)


def few(task):
    """A task whose test is short."""
    test = data.Examples(**{name: each[:8] for name, each in task.test.columns.items()})
    return Task(**(task._asdict() | dict(test=test)))


def test_what_was_made_whole_is_kept_and_stands_on_the_page(tmp_path, monkeypatch):
    for set_, by_claim in json.loads(larger.RESULTS.read_text()).items():
        variants = larger.TEN_TIMES if set_ == "cpu" else larger.ON_GPU
        for key, made in by_claim.items():
            assert list(made["runs"]) == [variant.name for variant in variants[key]]
            assert made["said"] == larger.said(key, made["runs"]) and not made["missing"]
    monkeypatch.setattr(larger, "RESULTS", tmp_path / "larger.json")
    assert larger.section() == []
    larger._keep("cpu", "6", {"said": ["it holds."], "seconds": 120})
    larger._keep("gpu", "1", {"said": ["it does not."], "seconds": 60})
    verdicts = {key: records.read(CLAIMS[key])["verdict"] for key in ("1", "6")}
    assert larger.section() == [
        "- Claim 6 (`python recipes/evidence/larger.py 6`, seed 0, 2 minutes; small models: "
        f"{verdicts['6']}): it holds.",
        "- Claim 1 (`python recipes/evidence/larger.py --gpu 1`, seed 0, 1 minutes; small models: "
        f"{verdicts['1']}): it does not.",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [False, True], ids=["ten times", "gpu"])
def test_every_set_up_takes_its_steps_and_is_judged_once(gpu, tmp_path, monkeypatch, capsys):
    tasks = {"digits": few(data.digits()), "stdlib": few(data.next_tokens())}
    monkeypatch.setattr("recipes.data.load", lambda name, *, model: tasks[name])
    options = ["--dry-run", "--work", str(tmp_path), *["--gpu"] * gpu]
    chosen = larger.ON_GPU if gpu else larger.TEN_TIMES
    # Out of time nothing begins, and what is missing is said.
    assert larger.main([*options, "6", "--minutes", "-1"]) == 1
    assert "not made: ['no block norms, lr 1e-2, plain'" in capsys.readouterr().out
    assert larger.main(options) == 0
    path = tmp_path / ("gpu" if gpu else "cpu") / "dry-run" / "larger.json"
    content = json.loads(path.read_text())
    assert {key: list(each["runs"]) for key, each in content.items()} == {
        key: [variant.name for variant in variants] for key, variants in chosen.items()
    }
    assert all(each["said"] and not each["missing"] for each in content.values())
    assert ("within 5 % of its best over " in capsys.readouterr().out) != gpu
    monkeypatch.setattr(larger, "run", lambda *_: pytest.fail("a run was made again"))
    assert larger.main(options) == 0
    with pytest.raises(SystemExit):
        larger.main(["4"])
    assert "there is no claim '4' in this set" in capsys.readouterr().err

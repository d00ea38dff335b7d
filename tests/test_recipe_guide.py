"""The user's guide of the recipes: its numbers are those of committed runs, its files are there."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
GUIDE = (RECIPES / "README.md").read_text()


def measured():
    """Means of the evidence's tables, and of the accuracies of `lora.py`."""
    page = (RECIPES / "evidence" / "README.md").read_text()
    found = {float(number) for number in re.findall(r"\| (\d+\.\d+) ± ", page)}
    accuracies = defaultdict(list)
    for run in json.loads((RECIPES / "evidence" / "lora.json").read_text())["runs"]:
        accuracies[run["optimizer"], run["learning_rate"]].append(run["test_accuracy"])
    return found | {mean(values) for values in accuracies.values()}


def unmeasured(text):
    """Numbers with a point that are no mean, to as many digits as they have; code aside."""
    text = re.sub(r"`[^`]*`|\d+\.\d+ M", "", text)
    means = measured()
    return [
        number
        for number in re.findall(r"\d+\.\d+", text)
        if not any(abs(float(number) - m) <= 0.51 * 10 ** -len(number.split(".")[1]) for m in means)
    ]


def test_every_number_of_the_guide_was_measured():
    said = GUIDE[: GUIDE.index("## Running")]
    assert len(re.findall(r"\d+\.\d+", said)) > 40
    assert unmeasured(said) == []
    assert unmeasured("ViT 1.94 to 0.271") == ["0.271"]


def test_the_first_row_of_the_guide_is_claim_1():
    claim = json.loads((RECIPES / "evidence" / "results" / "claim1.json").read_text())
    models = re.findall(r"([\w-]+) ([\d.]+) / ([\d.]+) / ([\d.]+)", claim["sentence"])
    assert [model for model, *_ in models] == ["ViT", "Swin", "GPT-2", "BERT"]
    row = re.findall(r"([\w-]+) ([\d.]+) to ([\d.]+) \(warmup: ([\d.]+)\)", GUIDE)
    said = [(model, *map(float, (plain, warm, ours))) for model, plain, ours, warm in row]
    assert said == [(model, *map(float, losses)) for model, *losses in models]


@pytest.mark.parametrize("folder", ["full", "small"])
def test_every_recipe_is_in_the_guide(folder):
    for path in (RECIPES / folder).glob("*.yaml"):
        assert f"`{path.stem}`" in GUIDE

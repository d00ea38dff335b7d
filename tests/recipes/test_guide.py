"""The user's guide of the recipes: its numbers are those of committed runs, its files are there."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
GUIDE = (RECIPES / "README.md").read_text()


LORA = "`lora.py`"
SOURCE = re.compile(rf"\((\d+(?:-\w+)?|{LORA})\)")
"""What stands in brackets behind numbers: their claim, or what measured them."""


def _shown(section):
    """Tables and findings of a claim, without the settings of its runs and what varies by seed."""
    return re.sub(r"± \d+\.\d+", "", section.partition("<details>")[0])


def measured():
    """Numbers by source: of the evidence's tables and findings by claim, and of `lora.py`."""
    page = (RECIPES / "evidence" / "README.md").read_text()
    _, *sections = re.split(r"^## Claim (\d+(?:-\w+)?)$", page, flags=re.MULTILINE)
    found = {
        claim: {float(number) for number in re.findall(r"\d+\.\d+", _shown(section))}
        for claim, section in zip(sections[::2], sections[1::2], strict=True)
    }
    accuracies = defaultdict(list)
    for run in json.loads((RECIPES / "evidence" / "lora.json").read_text())["runs"]:
        accuracies[run["optimizer"], run["learning_rate"]].append(run["test_accuracy"])
    return found | {LORA: {mean(values) for values in accuracies.values()}}


def units(text):
    """Cells of tables, items of lists and paragraphs: what a source in brackets can speak for.

    A source in the first cell of a row speaks for the row.
    """
    for part in re.split(r"\n\n|\n(?=[|-])", text):
        first, *cells = part.split(" | ")
        if not part.startswith("|"):
            yield part
        elif source := SOURCE.search(first):
            yield f"{' '.join(cells)} {source[0]}"
        else:
            yield from (first, *cells)


def numbers_by_source(text):
    """(number, its source) of all numbers with a point; None without a source behind it.

    The source is the next one behind a number in its cell, item or paragraph. Code and counts of
    parameters are left out.
    """
    for unit in units(text):
        *sourced, rest = SOURCE.split(unit)
        for part, source in [*zip(sourced[::2], sourced[1::2], strict=True), (rest, None)]:
            plain = re.sub(r"`[^`]*`|\d+\.\d+ M", "", part)
            for number in re.findall(r"\d+\.\d+", plain):
                yield number, source


def unmeasured(text):
    """Numbers that are no mean of their source, to as many digits as they have; with the source.

    One without a source may be of any.
    """
    means = measured()
    anywhere = set().union(*means.values())
    return [
        (number, source)
        for number, source in numbers_by_source(text)
        if not any(
            abs(float(number) - each) <= 0.51 * 10 ** -len(number.split(".")[1])
            for each in (anywhere if source is None else means.get(source, ()))
        )
    ]


def test_every_number_of_the_guide_was_measured_by_the_claim_behind_it():
    said = GUIDE[: GUIDE.index("## Running")]
    found = list(numbers_by_source(said))
    assert len(found) > 40 and sum(source is not None for _, source in found) > 0.9 * len(found)
    assert unmeasured(said) == []


def test_every_number_of_readmes_table_was_measured_by_the_claim_behind_it():
    readme = (RECIPES.parent / "README.md").read_text()
    table = readme.partition("## What to try\n\n")[2].partition("\n\n")[0]
    rates = re.compile(r"\bat 0\.\d+|[Aa] rate of 0\.\d+")
    text = rates.sub("", table)
    found = list(numbers_by_source(text))
    assert len(found) >= 15 and all(source for _, source in found)
    assert unmeasured(text) == []


def test_a_number_is_looked_up_in_the_claim_that_stands_next_behind_it():
    text = (
        "ViT 1.94 to 0.2 (warmup: 0.3) (1). 2.1 (6), 0.9 (`lora.py`)\n"
        "| 0.5 | 0.6 `0.7` 0.41 M (2) |"
    )
    assert list(numbers_by_source(text)) == [
        ("1.94", "1"), ("0.2", "1"), ("0.3", "1"), ("2.1", "6"), ("0.9", LORA), ("0.5", None),
        ("0.6", "2"),
    ]  # fmt: skip
    assert list(numbers_by_source("| a row (7) | 0.5 | 0.6 |")) == [("0.5", "7"), ("0.6", "7")]
    means = measured()
    only_in_1 = min(means["1"] - means["6"])
    assert unmeasured(f"{only_in_1} (1)") == [] == unmeasured(f"{only_in_1}")
    assert unmeasured(f"{only_in_1} (6)") == [(str(only_in_1), "6")]
    assert unmeasured("9.999") == [("9.999", None)] and unmeasured("0.27 (99)") == [("0.27", "99")]


def test_the_section_on_warmup_is_claim_1():
    claim = json.loads((RECIPES / "evidence" / "results" / "claim1.json").read_text())
    numbers = re.compile(
        r"([\w-]+): test loss ([\d.]+) .* and no warmup, ([\d.]+) .*, ([\d.]+) with AdamW2 and no "
        r"warmup, ([\d.]+) with"
    )
    found = [numbers.match(finding) for finding in claim["findings"]]
    rows = [(each[1], *map(float, each.groups()[1:])) for each in found if each]
    assert [model for model, *_ in rows] == ["ViT", "Swin", "GPT-2", "BERT"]
    section = " ".join(GUIDE.partition("## Training needs warmup")[2].partition("\n## ")[0].split())
    said = re.findall(r"of a ([\w-]+) from ([\d.]+) to ([\d.]+)", section)
    assert [(m, float(a), float(b)) for m, a, b in said] == [(m, a, c) for m, a, _, c, _ in rows]
    warm = re.search(
        r"AdamW with warmup reaches ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+) ", section
    )
    assert list(map(float, warm.groups())) == [row[2] for row in rows]
    lower = re.findall(r"(?:on|with|on BERT with) ([\d.]+) (?:\(1\)|and)", section)
    assert {row[4] for row in rows} <= set(map(float, lower))


@pytest.mark.parametrize("folder", ["full", "small"])
def test_every_recipe_is_in_the_guide(folder):
    for path in (RECIPES / folder).glob("*.yaml"):
        assert f"`{path.stem}`" in GUIDE

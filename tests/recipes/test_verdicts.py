"""How often verdicts are right: counted as it is said, and said as it was counted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from report_runs import FALLING, calm, write_run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hf_stable.report.reading import read_run  # noqa: E402
from recipes.evidence import verdicts  # noqa: E402


def row(knows_nothing, said_to_have_learnt, state="trained"):
    return {
        "knows_nothing": knows_nothing, "said_to_have_learnt": said_to_have_learnt, "state": state,
        "seed": 2, "logged_every": 1, "watched": True,
    }  # fmt: skip


def test_verdicts_are_wrong_in_two_ways():
    rows = [
        row(True, False, "failed"), row(True, False, "warned"), row(True, True),
        row(False, True), row(False, True, "warned"), row(False, False, "failed"),
        row(False, False, "warned"),
    ]  # fmt: skip
    found = verdicts.rates(rows)
    assert found == {
        "runs": 7, "right": 4, "know_nothing": 3, "missed": 1, "know_something": 4, "accused": 2,
        "failed": 1,
    }  # fmt: skip
    by_seed = verdicts.summary([*rows, row(True, True) | {"seed": 0}])
    assert by_seed["reported"]["watched, logged every 1"] == found
    assert by_seed["fixed_on"]["watched, logged every 1"]["missed"] == 1
    assert by_seed["reported"]["not watched, logged every 10"]["runs"] == 0


@pytest.mark.parametrize("test_loss", [2.29, 0.4])
def test_a_run_is_judged_as_it_might_have_been_logged(test_loss, tmp_path):
    probes = {step: calm(step) for step in range(10, 100, 10)}
    losses = FALLING if test_loss < 1 else [2.3 + 0.01 * math.sin(s) for s in range(100)]
    folder = write_run(tmp_path / "run", losses, probes)
    result = {
        "settings": {"model": "vit", "seed": 2}, "test_loss": test_loss, "reference": 2.303,
    }  # fmt: skip
    rows = verdicts.rows_of("a run", result, folder)
    assert [(r["logged_every"], r["watched"]) for r in rows] == [
        (1, True), (1, False), (10, True), (10, False),
    ]  # fmt: skip
    assert {r["knows_nothing"] for r in rows} == {test_loss > 1}
    assert {r["said_to_have_learnt"] for r in rows} == {test_loss < 1}
    assert [("watched" in r["headline"]) for r in rows] == [False, True, False, True]
    coarse = verdicts.logged(read_run(folder), 10, is_watched=True)
    assert coarse.losses[0] == (10, pytest.approx(sum(losses[:10]) / 10))
    assert len(coarse.losses) == 10 and len(coarse.probes) == 9


def test_what_is_committed_is_counted_from_its_runs_and_stands_in_the_card():
    content = json.loads(verdicts.RESULTS.read_text())
    rows = content["rows"]
    seeds = verdicts.FIXED_ON + verdicts.REPORTED_ON
    expected = [
        (variant.name, seed, every, watched)
        for variant in verdicts.variants()
        for seed in seeds
        for every in verdicts.LOGGED_EVERY
        for watched in (True, False)
    ]
    assert [(r["run"], r["seed"], r["logged_every"], r["watched"]) for r in rows] == expected
    summary = verdicts.summary(rows)
    assert {half: content[half] for half in summary} == summary
    card = " ".join((ROOT / "hf_stable" / "report" / "README.md").read_text().split())
    found = summary["reported"]["watched, logged every 1"]
    assert f"right on {found['right']} of {found['runs']} runs" in card
    assert f"missed {found['missed']} of {found['know_nothing']} runs that learnt nothing" in card
    assert f"accused {found['accused']} of {found['know_something']} that did" in card

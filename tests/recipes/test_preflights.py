"""How often a preflight is right: counted as it is said, and said as it was counted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from report_runs import FALLING, calm, write_run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes.evidence import alarms, preflights, verdicts  # noqa: E402


def row(fails, survives, undecided=False, steps=100, counts=True):
    return {"fails": fails, "survives": survives, "undecided": undecided, "steps": steps,
            "counts": counts}  # fmt: skip


def test_rates_are_judged_wrong_in_two_ways():
    rows = [
        row(True, False), row(True, False), row(True, True), row(False, True),
        row(False, True, undecided=True), row(False, False), row(False, False),
        row(True, True, counts=False),
    ]  # fmt: skip
    found = preflights.rates(rows)
    assert found == {
        "rates": 7, "left_out": 1, "right": 4, "fail": 3, "false_all_clears": 1,
        "hold": 4, "false_alarms": 2, "undecided": 1,
    }  # fmt: skip
    by_length = preflights.summary([*rows, row(True, True, steps=50)])
    assert by_length["legs of 100 steps"] == found
    assert by_length["legs of 50 steps"]["false_all_clears"] == 1


def test_legs_are_judged_by_their_steps_and_runs_by_their_test(tmp_path):
    late = [*FALLING[:60], *(9.0 + 0.01 * math.sin(s) for s in range(40))]
    results = []
    for factor in preflights.FACTORS:
        losses = late if factor == 10 else FALLING
        probes = {step: calm(step) for step in range(10, 100, 10)}
        folder = write_run(tmp_path / f"{factor:g}", losses, probes)
        results.append(
            {
                "settings": {"model": "vit", "seed": 5, "output": str(folder)},
                "test_loss": None if factor == 10 else 0.4,
                "reference": 2.303,
            }  # fmt: skip
        )
    rows = list(preflights.rows_of("a run", results))
    assert [r["steps"] for r in rows] == [50] * 4 + [100] * 4
    assert [r["fails"] for r in rows] == [False, False, False, True] * 2
    assert all(r["counts"] for r in rows)
    assert [r["survives"] for r in rows] == [True] * 4 + [True, True, True, False]
    assert preflights.rates(rows)["false_all_clears"] == 1
    for result in results:
        result["test_loss"] = 2.3
    assert preflights.rates(preflights.rows_of("a run", results))["left_out"] == 8


def test_what_is_committed_is_counted_from_its_runs_and_stands_in_the_card():
    content = json.loads(preflights.RESULTS.read_text())
    rows = content["rows"]
    expected = [
        (name, seed, steps, factor)
        for name in preflights.PLANNED
        for seed in preflights.SEEDS
        for steps in preflights.LEGS
        for factor in preflights.FACTORS
    ]
    assert [(r["planned"], r["seed"], r["steps"], r["factor"]) for r in rows] == expected
    assert len(preflights.PLANNED) >= 12
    assert set(preflights.SEEDS).isdisjoint({*alarms.FIXED_ON, *verdicts.FIXED_ON})
    summary = preflights.summary(rows)
    assert {length: content[length] for length in summary} == summary
    card = " ".join((ROOT / "hf_stable" / "commands" / "README.md").read_text().split())
    page = (ROOT / "recipes" / "evidence" / "README.md").read_text()
    sentences = preflights.said(summary)
    found = summary["legs of 50 steps"]
    assert sentences[0].startswith(f"legs of 50 steps: {found['right']} of {found['rates']} rates")
    for sentence in sentences:
        assert sentence in card and sentence in page

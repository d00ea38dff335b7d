"""Evidence on tau: what is committed is counted from its runs and was not chosen by them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hf_stable.adamw2.planning import plan_tau  # noqa: E402
from recipes.evidence import short_runs, tau  # noqa: E402


def test_what_is_committed_is_counted_from_its_runs_and_stands_in_the_card():
    content = json.loads(tau.RESULTS.read_text())
    assert content["verdict"] == tau.verdict(content["reported"])
    for half, runs in (("fixed_on", tau.FIXED_ON), ("reported", tau.REPORTED_ON)):
        done = [(e["setup"], e["method"], s) for e in content[half] for s in e["seeds"]]
        assert sorted(done) == sorted((s.name, m.name, seed) for s, m, seed in runs)
        assert all(len(e["losses"]) == len(e["accuracies"]) == len(e["seeds"])
                   for e in content[half])  # fmt: skip
    steps = {setup.name: setup.steps for setup in tau.TESTED}
    planned = [e for e in content["reported"] if e["method"] == tau.PLANNED.name]
    assert len(planned) == len(tau.TESTED)
    for entry in planned:
        assert entry["tau"] == plan_tau((steps[entry["setup"]] + 1) / 2)
    assert {seed for *_, seed in tau.FIXED_ON}.isdisjoint(tau.SEEDS)
    assert {setup.name for setup in tau.TESTED}.isdisjoint(s.name for s, *_ in tau.FIXED_ON)

    card = " ".join((ROOT / "hf_stable" / "adamw2" / "README.md").read_text().split())
    for name in (tau.DEFAULT.name, tau.PLAIN.name, tau.WARM.name):
        found = content["verdict"][name]
        assert f"better than {name} in {found['better']} and worse in {found['worse']}" in card
    assert f"of the {len(tau.TESTED)} set-ups" in card


def entry(setup, method, *losses):
    return {"setup": setup, "method": method, "losses": losses}


def test_better_and_worse_are_counted_by_set_up():
    names = [method.name for method in tau.COMPARED if method != tau.PLANNED]
    entries = [entry("a", name, 1.0, 1.0) for name in names]
    entries += [entry("b", name, 2.0, 4.0) for name in names]
    entries += [entry("a", tau.PLANNED.name, 1.04, 1.04), entry("b", tau.PLANNED.name, 2.0, 3.5)]
    found = tau.verdict(entries)
    assert found["AdamW"] == {"better": 1, "worse": 0, "lower": 1, "of": 2}
    entries[0] = entry("a", "AdamW", 1.0, 0.9)
    entries[4] = entry("a", "tau=0.1", 0.5, 0.5)
    found = tau.verdict(entries)
    assert found["AdamW"]["worse"] == 1 and found["AdamW, warmup"]["worse"] == 0
    assert found["best fixed tau"] == {"better": 1, "worse": 1, "lower": 1, "of": 2}
    entries[0] = entry("a", "AdamW", 1.0, None)
    assert tau.verdict(entries)["AdamW"]["better"] == 2


def test_runs_that_are_done_are_taken_and_seeds_differ(tmp_path):
    setup = short_runs.Setup("ViT", "scratch", 1e-2, 3)
    runs = [(setup, method, seed) for method in (tau.PLANNED, tau.DEFAULT) for seed in (0, 1)]
    rows = tau.do(tmp_path / "work.jsonl", runs[:3])
    assert [row["tau"] for row in rows] == [plan_tau(2)] * 2 + [0.01]
    assert rows[0]["loss"] != rows[1]["loss"] != rows[2]["loss"] and rows[0]["loss"] > 1
    lines = (tmp_path / "work.jsonl").read_text().replace(f"{rows[0]['loss']}", "7.5", 1)
    (tmp_path / "work.jsonl").write_text(lines)
    again = tau.do(tmp_path / "work.jsonl", runs)
    assert [row["loss"] for row in again[:3]] == [7.5, rows[1]["loss"], rows[2]["loss"]]
    assert math.isfinite(again[3]["loss"])
    assert [e["seeds"] for e in tau.thinned(again)] == [[0, 1], [0, 1]]


@pytest.mark.slow
def test_fine_tuning_starts_from_what_was_learnt_with_a_fresh_head():
    model = "ViT"
    fresh, other = (short_runs.start_of(short_runs.Setup(model, start, 1e-3, 1), 0)
                    for start in ("scratch", "fine-tuned"))  # fmt: skip
    learnt = short_runs.pretrained(model)
    inside = other.base_model.state_dict()
    assert all(inside[name].equal(value) for name, value in learnt.items())
    head = set(other.state_dict()) - {f"{other.base_model_prefix}.{name}" for name in inside}
    assert head and all(other.state_dict()[name].abs().max() < 0.2 for name in head)
    assert any(not inside[n].equal(v) for n, v in fresh.base_model.state_dict().items())

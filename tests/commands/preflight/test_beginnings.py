"""The beginning of a run is judged as a leg is, and by nothing that came later."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from report_runs import FALLING, calm, write_run

from hf_stable.commands.preflight.beginnings import judge_beginnings
from hf_stable.report.reading import read_run


def written(folder, losses):
    probes = {step: calm(step) for step in range(10, len(losses), 10)}
    return read_run(write_run(folder, losses, probes))


def test_what_comes_later_is_not_seen(tmp_path):
    late = [*FALLING[:60], *(9.0 + 0.01 * math.sin(s) for s in range(60))]
    runs = {1: written(tmp_path / "falls", FALLING), 3: written(tmp_path / "late", late)}
    assert {k: v.kind for k, v in judge_beginnings(runs, 50).items()} == {1: "trains", 3: "trains"}
    later = judge_beginnings(runs, 100)
    assert later[1].survives and later[3].kind == "diverges"


def test_a_loss_that_stands_still_counts_only_if_another_moves(tmp_path):
    still = [2.3 + 0.01 * math.sin(s) for s in range(100)]
    runs = {1: written(tmp_path / "a", still), 3: written(tmp_path / "b", still)}
    assert all(
        outcome.survives and outcome.reason for outcome in judge_beginnings(runs, 60).values()
    )
    runs[0.3] = written(tmp_path / "c", FALLING)
    assert judge_beginnings(runs, 60)[3].kind == "stalls"


def test_a_loss_that_broke_out_and_came_down_to_that_of_guessing_stalls(tmp_path):
    broke_out = [2.4, 9.0, 8.0, *(2.3 + 5 * 0.8**s + 0.01 * math.sin(s) for s in range(60))]
    runs = {1: written(tmp_path / "a", FALLING), 3: written(tmp_path / "b", broke_out)}
    assert judge_beginnings(runs, 60)[3].kind == "trains"  # as far as the loss alone tells
    runs[3] = replace(runs[3], guessing=math.log(10))
    assert judge_beginnings(runs, 60)[3].kind == "stalls"


def test_too_few_runs_or_steps_are_refused(tmp_path):
    run = written(tmp_path / "a", FALLING)
    with pytest.raises(ValueError, match="no multiple 1, .* its multiples are 0.3, 3"):
        judge_beginnings({0.3: run, 3: run}, 50)
    with pytest.raises(ValueError, match="the run at 1 times the rate has 100 steps, .* have 200"):
        judge_beginnings({1: run}, 200)

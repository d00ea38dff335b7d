"""The benchmarks report what they measured; how fast anything is, they do not assert."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from importlib.metadata import version

import pytest
import torch
from rich.console import Console

from hf_stable.commands.bench.cost_tables import cost_table
from hf_stable.commands.bench.sigma import TINY, bench_sigma
from hf_stable.commands.bench.timing import (
    FEWEST_ROUNDS,
    TOTAL,
    PhaseClock,
    alternate,
    print_summaries,
    summarise,
    write_results,
)

VARIANTS = ["plain", "plain again", "sigma_reparam", "torch spectral_norm"]


def printed(write) -> str:
    console = Console(file=io.StringIO(), width=200)
    write(console)
    return console.file.getvalue()


def test_a_clock_adds_up_laps_of_one_name():
    times = iter([0.0, 1.0, 3.0, 6.0])
    clock = PhaseClock(timer=lambda: next(times))
    for phase in ("a", "b", "a"):
        clock.lap(phase)
    assert clock.seconds == {"a": 4.0, "b": 2.0}


def test_subjects_alternate_and_every_other_round_runs_backwards():
    order = []

    def subject(name):
        def run():
            order.append(name)
            return {"forward": len(order), "backward": 1}

        return run

    samples = alternate({name: subject(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "cba" + "abc" + "cba"
    assert samples["a"] == {"forward": [6, 7, 12], "backward": [1, 1, 1], TOTAL: [7, 8, 13]}


def test_a_limit_in_seconds_leaves_enough_rounds():
    samples = alternate({"a": lambda: {"forward": 1.0}}, rounds=50, seconds=0)
    assert len(samples["a"][TOTAL]) == FEWEST_ROUNDS
    assert len(alternate({"a": lambda: {"forward": 1.0}}, rounds=2)["a"][TOTAL]) == 2


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds=0 measures nothing"):
        alternate({"a": dict}, rounds=0)


def test_ratios_are_medians_of_ratios_within_a_round():
    samples = {
        "base": {"forward": [1.0, 10.0, 2.0]},
        "other": {"forward": [2.0, 10.0, 6.0], "refresh": [1.0, 1.0, 1.0]},
    }
    base, forward, refresh = summarise("case", samples, "base")
    assert (base.ratio, base.milliseconds) == (1.0, 2000.0)
    # Round by round 2, 1 and 3; the ratio of the medians would be 3.
    assert (forward.ratio, forward.milliseconds, forward.rounds) == (2.0, 6000.0, 3)
    assert forward.ratio_quartiles == (1.0, 3.0)
    assert refresh.ratio is None and refresh.ratio_quartiles is None
    with pytest.raises(ValueError, match="baseline 'nobody' was not measured"):
        summarise("case", samples, "nobody")


def test_table_and_json_hold_the_summaries(tmp_path):
    summaries = summarise("a case", {"a": {"x": [0.5]}, "b": {"x": [0.6], "y": [0.1]}}, "a")
    table = printed(lambda console: print_summaries("the title", summaries, console))
    for text in ("the title", "a case", "500.00", "600.00", "1.200", "100.00"):
        assert text in table
    write_results(tmp_path / "results.json", map(asdict, summaries), {"settings": {"rounds": 1}})
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["settings"] == {"rounds": 1}
    assert content["machine"]["threads"] == torch.get_num_threads()
    versions = content["machine"]["versions"]
    assert torch.__version__.startswith(versions["torch"]) and versions["transformers"]
    assert content["machine"]["processor"] and content["machine"]["load"] >= 0
    assert [row["ratio"] for row in content["results"]] == [s.ratio for s in summaries]


def test_bench_sigma_measures_every_case_and_variant(tmp_path):
    path = tmp_path / "sigma.json"
    results = []
    table = printed(
        lambda console: results.extend(
            bench_sigma(output=path, rounds=2, sizes=TINY, threads=1, console=console)
        )
    )
    cases = list(dict.fromkeys(row.case for row in results))
    assert cases == [
        "vit step, batch 2, 1 thread",
        "vit eval, batch 2, 1 thread",
        "vit 16 wide step, batch 2, 1 thread",
        "gpt2 step, batch 2, 1 thread",
        "gpt2 eval, batch 2, 1 thread",
        "gpt2 16 wide step, batch 2, 1 thread",
        "gpt2 generate, batch 2, 1 thread",
    ]
    for case in cases:
        assert [r.subject for r in results if r.case == case and r.phase == TOTAL] == VARIANTS
        assert case in table
    steps = [r for r in results if r.case == cases[0] and r.subject == "sigma_reparam"]
    assert {r.phase for r in steps} == {"forward", "backward", "optimizer", "refresh", TOTAL}
    assert not any(r.phase == "refresh" for r in results if r.subject != "sigma_reparam")
    assert all(r.rounds == 2 for r in results)
    for case in cases:  # the median of two rounds is their mean, which adds up
        for variant in VARIANTS:
            own = [r for r in results if (r.case, r.subject) == (case, variant)]
            (whole,) = (r.milliseconds for r in own if r.phase == TOTAL)
            phases = sum(r.milliseconds for r in own if r.phase != TOTAL)
            assert whole == pytest.approx(phases, rel=1e-9)
    assert all(r.ratio == 1 for r in results if r.subject == "plain")
    content = json.loads(path.read_text())
    assert len(content["results"]) == len(results)
    assert content["results"][-1]["milliseconds"] == results[-1].milliseconds
    assert f"{results[-1].milliseconds:.2f}" in table
    assert content["settings"]["hidden"] == 16


def test_bench_sigma_runs_chosen_cases_and_counts_processor_time():
    results = []
    table = printed(
        lambda console: results.extend(
            bench_sigma(
                rounds=1, sizes=TINY, only="vit eval", threads=1, cpu_time=True, console=console
            )
        )
    )
    assert {row.case for row in results} == {"vit eval, batch 2, 1 thread"}
    assert "processor time" in table
    with pytest.raises(ValueError, match="no case has 'swin' in its name; the cases are vit step"):
        bench_sigma(rounds=1, sizes=TINY, only="swin")


def test_a_table_of_costs_says_how_it_was_measured(tmp_path):
    rows = [
        *summarise("a case, 1 thread", {"a": {"x": [0.5]}, "b": {"x": [0.6]}}, "a"),
        *summarise("more", {"a": {"x": [2.0, 2.0]}, "b": {"x": [1.0, 1.0]}}, "a"),
        *summarise("another", {"a": {"x": [0.01]}, "c": {"x": [0.025], "y": [0.005]}}, "a"),
    ]
    # `alternate` adds the sum of all phases.
    totals = [replace(row, phase=TOTAL) for row in rows if row.phase == "x"]
    settings = {"benchmark": "adamw2", "baseline": "a", "timer": "processor time"}
    write_results(tmp_path / "r.json", map(asdict, [*rows, *totals]), {"settings": settings})
    how, *lines = cost_table(json.loads((tmp_path / "r.json").read_text()))
    assert how.startswith("Medians of 1 to 2 alternated rounds, processor time; ")
    assert f"torch {version('torch')}" in how and "`hf-stable bench adamw2`" in how
    assert lines == [
        "", "| case | a, ms | b |", "|---|---|---|",
        "| a case, 1 thread | 500 | 1.20 |", "| more | 2000 | 0.50 |",
        "", "| case | a, ms | c |", "|---|---|---|", "| another | 10 | 2.50 |",
    ]  # fmt: skip
    shares = {"a": {"extra state": 0.001, "working memory": 0.0}}
    for memory in ({"all rows": 2.1}, shares):  # the monitor's is one number for each way
        write_results(
            tmp_path / "m.json", map(asdict, totals), {"settings": {**settings, "memory": memory}}
        )
        more = cost_table(json.loads((tmp_path / "m.json").read_text()))[1 + len(lines) :]
        assert bool(more) == (memory is shares)
    assert more == [
        "", "| share of the parameters' bytes | extra state | working memory |", "|---|---|---|",
        "| a | 0.10% | 0.00% |",
    ]  # fmt: skip

"""The benchmark of the monitor compares what it says, and measures memory."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from hf_stable.commands.bench.monitor import (
    AMORTISED,
    BASELINE,
    TINY,
    bench_monitor,
    measure_entropy_memory,
)
from hf_stable.commands.bench.timing import TOTAL


def test_every_subject_runs_on_both_models(tmp_path):
    console = Console(record=True, width=200)
    rows = bench_monitor(
        output=tmp_path / "r.json", rounds=3, sizes=TINY, threads=1, console=console
    )
    assert {row.case for row in rows} == {"gpt2 step, 1 thread", "vit step, 1 thread"}
    for case in {row.case for row in rows}:
        found = {r.subject: r for r in rows if r.case == case and r.phase == TOTAL}
        assert found[BASELINE].ratio == 1 and len(found) == 7
        between = sorted(
            found[f"monitor, {kind}"].milliseconds for kind in ("no probe", "default terms")
        )
        assert between[0] <= found[AMORTISED].milliseconds <= between[1]
        # A probed step does more than one that is not, and all terms more than some.
        assert found["monitor, all terms"].milliseconds > found["monitor, no probe"].milliseconds
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["settings"]["memory"] == measure_entropy_memory(TINY.keys)
    assert "share of one T x T matrix" in console.export_text()
    with pytest.raises(ValueError, match="no case has 'bert'"):
        bench_monitor(rounds=1, sizes=TINY, only="bert")


def test_entropy_keeps_no_whole_map():
    shares = measure_entropy_memory(4096)
    assert shares["64 rows"] < 0.05 and shares["all rows"] < 0.5
    assert shares["from the whole map"] > 2

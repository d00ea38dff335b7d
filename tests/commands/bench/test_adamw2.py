from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model

from hf_stable.commands.bench.adamw2 import BASELINE, TINY, bench_adamw2, measure_memory
from hf_stable.commands.bench.cost_model import measure_shape
from hf_stable.commands.bench.timing import TOTAL


@pytest.mark.slow
def test_every_case_compares_adamw2_with_the_fused_adamw(tmp_path):
    console = Console(record=True, width=200)
    options = dict(output=tmp_path / "r.json", rounds=1, threads=1, console=console)
    rows = bench_adamw2(sizes=TINY, **options)
    cases = {row.case.removesuffix(", 1 thread"): row.case for row in rows}
    assert cases.keys() == {
        "gpt2 step alone", "vit step alone", "gpt2 16 wide, 2 blocks, step alone",
        "gpt2 training step", "gpt2 of 1 blocks", "gpt2 of 2 blocks",
    }  # fmt: skip
    peers = {row.subject for row in rows if row.case == cases["vit step alone"]}
    assert "naive loop" in peers and "AdamW2 by torch alone" in peers
    if find_spec("pytorch_optimizer"):
        assert {f"pytorch_optimizer's {name}" for name in ("AdamW", "StableAdamW", "SPAM")} < peers
    cases = set(cases.values())
    for case in cases:
        found = {row.subject: row for row in rows if (row.case, row.phase) == (case, TOTAL)}
        assert found[BASELINE].ratio == 1 and "AdamW2" in found
        # Of one round the ratio of medians is the ratio.
        for row in found.values():
            expected = row.milliseconds / found[BASELINE].milliseconds
            assert row.ratio == pytest.approx(expected, rel=1e-9)
    content = json.loads((tmp_path / "r.json").read_text())
    assert len(content["results"]) == len(rows)
    memory = content["settings"]["memory"]
    assert memory["AdamW2"]["extra state"] > 2 * memory["AdamW foreach"]["extra state"]
    assert "working memory" in console.export_text()


def test_a_case_runs_on_one_thread_and_on_all():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = bench_adamw2(rounds=1, sizes=TINY, only="16 wide")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    case = "gpt2 16 wide, 2 blocks, step alone"
    assert {row.case for row in rows} == {f"{case}, 1 thread", f"{case}, 2 threads"}


def test_refuses_a_case_that_does_not_exist():
    with pytest.raises(ValueError, match="no case has 'llama'"):
        bench_adamw2(rounds=1, sizes=TINY, only="llama")


def test_working_memory_is_a_batch_of_weights_not_a_copy_of_the_model():
    model = tiny_model("gpt2", n_embd=256, n_layer=4, vocab_size=1000)
    shares = measure_memory(model)
    largest = 4 * 256 * 256 / (256 * 1032 + 4 * 12 * 256 * 256)
    assert 0.9 * largest < shares["AdamW2"]["working memory"] < 1.5 * largest
    # Of a block the right singular vectors of weight and update, and a rate; of a parameter a step.
    shape, params = measure_shape(model), list(model.parameters())
    kept = sum(2 * 4 * columns + 5 for _, columns in shape.bounded) + 4 * len(params)
    total = sum(param.nbytes for param in params)
    assert shares["AdamW2"]["extra state"] == pytest.approx(kept / total, rel=1e-9)
    assert shares["AdamW foreach"]["extra state"] == 4 * len(params) / total
    assert shares["AdamW foreach"]["working memory"] > 0.5

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model

from hf_stable.commands.bench.adamw2 import BASELINE, AdamW2BenchSizes, bench_adamw2, measure_memory
from hf_stable.commands.bench.cost_model import measure_shape
from hf_stable.commands.bench.timing import TOTAL

TINY = AdamW2BenchSizes(
    layers=1, hidden=64, vocabulary=300, batch=1, sequence=4, depths=(1, 2), depth_hidden=64
)


def test_every_case_compares_adamw2_with_the_fused_adamw(tmp_path):
    threads = torch.get_num_threads()
    console = Console(record=True, width=200)
    rows = bench_adamw2(output=tmp_path / "r.json", rounds=1, sizes=TINY, console=console)
    cases = {row.case for row in rows}
    assert {"gpt2 step alone, 1 thread", "vit step alone, 1 thread"} <= cases
    assert {"gpt2 training step", "gpt2 of 1 blocks", "gpt2 of 2 blocks"} <= cases
    for case in cases:
        found = {row.subject: row for row in rows if (row.case, row.phase) == (case, TOTAL)}
        assert found[BASELINE].ratio == 1 and "AdamW2" in found
        # Of one round the ratio of medians is the ratio.
        for row in found.values():
            expected = row.milliseconds / found[BASELINE].milliseconds
            assert row.ratio == pytest.approx(expected, rel=1e-9)
    assert torch.get_num_threads() == threads
    content = json.loads((tmp_path / "r.json").read_text())
    assert len(content["results"]) == len(rows)
    memory = content["settings"]["memory"]
    assert memory["AdamW2"]["extra state"] > 2 * memory["AdamW foreach"]["extra state"]
    assert "working memory" in console.export_text()


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

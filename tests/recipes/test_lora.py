"""The recipe that sweeps learning rates of LoRA, and what its committed results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "lora.py"
EVIDENCE = ROOT / "recipes" / "evidence" / "lora.json"


@pytest.mark.slow
def test_the_recipe_runs(tmp_path):
    result = subprocess.run(
        [sys.executable, RECIPE, "--quick", "--output", tmp_path / "lora.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    quick, whole = (json.loads(path.read_text()) for path in (tmp_path / "lora.json", EVIDENCE))
    assert quick.keys() == whole.keys() and quick["lora"] == whole["lora"]
    assert quick["runs"][0].keys() == whole["runs"][0].keys()
    assert "| AdamW2, merged |" in result.stdout


def test_the_evidence_is_a_whole_sweep():
    content = json.loads(EVIDENCE.read_text())
    cells = {(r["optimizer"], r["learning_rate"], r["seed"]) for r in content["runs"]}
    optimizers, rates, seeds = map(set, zip(*cells, strict=True))
    assert len(cells) == len(content["runs"]) == len(optimizers) * len(rates) * len(seeds)
    assert len(optimizers) == len(seeds) == 3 and max(rates) >= 100 * min(rates)

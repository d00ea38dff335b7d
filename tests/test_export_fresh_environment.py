"""Exported folders in an environment that has transformers and torch, and nothing else of ours."""

from __future__ import annotations

import subprocess

import pytest
import torch
import transformers
from exported_cases import ALL, export_case, run_script
from test_packaging import make_environment


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a new virtual environment."""
    version = torch.__version__.split("+")[0]
    path = tmp_path_factory.mktemp("fresh") / "venv"
    return make_environment(path, f"torch=={version}", f"transformers=={transformers.__version__}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_environment_loads_runs_and_saves_every_folder(python, tmp_path):
    shown = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert "transformers" in shown
    for absent in ("hf-stable", "hf_stable", "accelerate", "peft"):
        assert absent not in shown
    cases = [export_case(tmp_path, *each) for each in ALL]
    results = run_script(tmp_path, cases, python)
    failed = {name: outcome["error"] for name, outcome in results.items() if outcome["error"]}
    assert not failed
    assert len(results) == len(ALL)

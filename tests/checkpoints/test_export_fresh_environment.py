"""An environment with transformers and torch alone: exported folders in it, then the wheel."""

from __future__ import annotations

import subprocess

import pytest
import torch
import transformers
from exported_cases import ALL, export_case, run_script
from fresh_environments import check_wheel, make_environment


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_environment_loads_runs_and_saves_every_folder_and_takes_the_wheel(tmp_path):
    version = torch.__version__.split("+")[0]
    python = make_environment(
        tmp_path / "venv", f"torch=={version}", f"transformers=={transformers.__version__}"
    )
    shown = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert "transformers" in shown
    for absent in ("hf-stable", "hf_stable", "accelerate", "peft"):
        assert absent not in shown
    cases = [export_case(tmp_path, *each) for each in ALL]
    results = run_script(tmp_path, cases, python)
    failed = {name: outcome["error"] for name, outcome in results.items() if outcome["error"]}
    assert not failed
    assert len(results) == len(ALL)
    check_wheel(python, tmp_path)

"""The check for GPUs is tried on a CPU with small models, so that the script is known to work."""

from __future__ import annotations

import json

import pytest

from hf_stable.commands.main import main
from hf_stable.kernels.choosing import SWITCH
from recipes import gpu_check

IN_PROCESSES = ("tests", "adamw2")
"""Parts that are started as the check starts them. A process imports torch and transformers, which
is most of what a part of small models takes, so the others are called in this one."""


@pytest.mark.slow
def test_every_part_runs_and_leaves_its_figures(tmp_path, monkeypatch):
    start = gpu_check.run

    def run(part, seconds, output):
        if part.name in IN_PROCESSES:
            return start(part, seconds, output)
        module, command = part.arguments[:2], part.arguments[2:]
        assert module == ("-m", "hf_stable.commands.main")
        with monkeypatch.context() as patch:
            patch.setenv(SWITCH, part.kernels)
            return {"part": part.name, "code": main(command), "seconds": 0.0}

    monkeypatch.setattr(gpu_check, "run", run)
    options = ["--output", str(tmp_path), "--device", "cpu", "--tiny", "--minutes", "30"]
    code = gpu_check.main(options)
    summary = {
        part["part"]: part["code"] for part in json.loads((tmp_path / "summary.json").read_text())
    }
    tests = (tmp_path / "tests.log").read_text()
    # Without a GPU every test is skipped, which is no failure.
    assert code == summary.pop("tests") == 0, tests
    assert "skipped" in tests and "error" not in tests
    assert summary == dict.fromkeys(("adamw2", "adamw2-triton", "sigma", "monitor"), 0)
    for name in summary:
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert content["results"] and content["machine"]["device"] == "cpu"


def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path):
    part = gpu_check.Part("sleeper", 1.0, ("-c", "import time; time.sleep(60)"))
    result = gpu_check.run(part, 0.5, tmp_path)
    assert result["code"] is None and result["seconds"] < 30

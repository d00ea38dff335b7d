"""Compilation is announced once and kept on disk; without numba torch does the same, quietly."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

STEP = """
import sys
{before}
import torch
import hf_stable
assert "numba" not in sys.modules or sys.modules["numba"] is None, "compiled at import"
torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(40, 30))
optimizer = hf_stable.AdamW2([weight], lr=1e-2)
for _ in range(3):
    weight.grad = torch.randn(40, 30)
    optimizer.step()
torch.save(weight.detach(), sys.argv[1])
"""
WITHOUT_NUMBA = "sys.modules['numba'] = None"


def run(folder, name, before=""):
    """Steps of AdamW2 in a process of its own: the weight, and what it said on stderr."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "cache")}
    environment.pop("HF_STABLE_KERNELS", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STEP.format(before=before), str(folder / name)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "hf_stable" in line]
    return torch.load(folder / name), said


@pytest.mark.slow
def test_code_is_compiled_once_and_says_so(tmp_path):
    pytest.importorskip("numba")
    first, said = run(tmp_path, "first")
    assert len(said) == 2 and all("once for this machine" in line for line in said)
    kept = sorted((tmp_path / "cache").rglob("*.nb*"))
    again, said = run(tmp_path, "again")
    assert said == [] and kept and kept == sorted((tmp_path / "cache").rglob("*.nb*"))
    assert torch.equal(first, again)
    plain, said = run(tmp_path, "plain", WITHOUT_NUMBA)
    assert said == []
    # The gradients turn, so both ways iterate equally often. Each rounds the weight twice after the
    # first step, by half a unit in the last place; a rate of 0.01 hides its own rounding.
    torch.testing.assert_close(plain, first, rtol=1e-6, atol=1e-7)
    assert not torch.equal(plain, first)  # other sums: it was torch

"""The tests of `interpreted`, in a process in which Triton interprets its kernels, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = Path(__file__).with_name("interpreted.py")


def run_interpreted(*arguments, interpret="1"):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run(
        [*command, *arguments], env=environment, cwd=INTERPRETED.parents[2], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.slow
def test_the_kernels_step_and_refresh_right():
    run_interpreted("-k", "not every_layout")


@pytest.mark.slow
def test_the_kernels_step_every_layout_right():
    run_interpreted("-k", "every_layout")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_are_right_on_a_gpu():
    run_interpreted(interpret="0")

"""Run a function of a test module in several real processes, joined by gloo on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: str) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo group; return the ranks' results in order.

    The function is found by name in its module; it returns what `torch.load` reads with
    `weights_only=True`. A rank that fails fails the call, with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = [folder, function.__module__, function.__qualname__, *args]
        environment = os.environ | {"WORLD_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *where],
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(num_ranks)
        ]
        try:
            printed = [rank.communicate(timeout=300)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        for number, (rank, text) in enumerate(zip(ranks, printed, strict=True)):
            assert rank.returncode == 0, f"rank {number} failed:\n{text}"
        return [torch.load(f"{folder}/result{rank}") for rank in range(num_ranks)]


def _main(folder: str, module: str, name: str, *args: str) -> None:
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    try:
        result = getattr(import_module(module), name)(*args)
        torch.save(result, f"{folder}/result{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    _main(*sys.argv[1:])

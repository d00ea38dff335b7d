"""Run a function of a test module in several real processes, joined by gloo on this machine.

They are forked from a server that has imported what every rank needs: that takes seconds for each
process otherwise, most of what such a test costs.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 300

_context = multiprocessing.get_context("forkserver")
_models = ("gpt2", "vit", "swin", "bert")
_context.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "transformers.trainer",
        *(f"transformers.models.{name}.modeling_{name}" for name in _models),
        "hf_stable",
    ]
)


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo group; return the ranks' results in order.

    The function is found by name in its module; it returns what `torch.load` reads with
    `weights_only=True`. The ranks have the environment that torchrun gives. A rank that fails fails
    the call, with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ) | {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": "1",
        }
        ranks = run_processes(
            [
                (_join, (folder, environment | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
                         function.__module__, function.__qualname__, *args))
                for rank in range(num_ranks)
            ],
            Path(folder),
        )  # fmt: skip
        # The rank that failed first says why; the others lost it.
        said = "\n".join(
            f"rank {i} ended with {code}:\n{text}" for i, (code, text) in enumerate(ranks)
        )
        assert not any(code for code, _ in ranks), said
        return [torch.load(f"{folder}/result{rank}") for rank in range(num_ranks)]


def run_processes(
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]], folder: Path
) -> list[tuple[int | None, str]]:
    """Call functions in processes of their own, all at once; return exit codes and what they print.

    Args:
        calls: functions of modules, and their arguments.
        folder: for what is printed.
    """
    processes = []
    for number, (function, args) in enumerate(calls):
        printed = folder / f"printed{number}"
        process = _context.Process(target=_printing_to, args=(printed, function, *args))
        process.start()
        processes.append((process, printed))
    deadline = time.monotonic() + SECONDS
    for process, _ in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [(process.exitcode, printed.read_text()) for process, printed in processes]


def _printing_to(path: Path, function: Callable[..., Any], *args: Any) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    gc.freeze()  # what the server has imported, as tests/conftest.py says
    function(*args)
    sys.stdout.flush()


def _join(folder: str, environment: dict[str, str], module: str, name: str, *args: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank, num_ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    result = getattr(import_module(module), name)(*args)
    torch.save(result, f"{folder}/result{rank}")
    dist.barrier()  # a rank that left while another still talks to it would abort that one
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]

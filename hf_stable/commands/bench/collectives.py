"""What collectives take between processes of this machine, which are started for it (gloo)."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing

from hf_stable._json import to_json
from hf_stable.commands.bench.cost_model import Cost
from hf_stable.commands.bench.timing import TOTAL, alternate

__all__ = ["time_collectives"]

CALLS = 20
"""Times that one sample is repeated: a single one takes a fraction of a millisecond."""


def time_collectives(
    costs: Mapping[str, Cost], num_processes: int, rounds: int
) -> dict[str, float]:
    """Return the seconds that the collectives of each cost take between processes started here."""
    calls = {
        name: [int(each.bytes / each.count) for each in cost.collectives for _ in range(each.count)]
        for name, cost in costs.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _exchange, (folder, num_processes, calls, rounds), nprocs=num_processes
        )
        return json.loads((Path(folder) / "seconds.json").read_text())


def _exchange(
    rank: int, folder: str, num_processes: int, calls: Mapping[str, Sequence[int]], rounds: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_processes
    )
    tensors = {name: [torch.zeros(size // 4) for size in sizes] for name, sizes in calls.items()}

    def exchange(name: str) -> Mapping[str, float]:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(CALLS):
            for tensor in tensors[name]:
                dist.all_reduce(tensor)
        return {TOTAL: (time.perf_counter() - start) / CALLS}

    samples = alternate({name: partial(exchange, name) for name in calls}, rounds=rounds)
    if rank == 0:
        seconds = {name: median(samples[name][TOTAL]) for name in calls}
        (Path(folder) / "seconds.json").write_text(to_json(seconds))
    dist.barrier()
    dist.destroy_process_group()

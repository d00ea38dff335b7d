"""Seconds from counts (`cost_model`): the rates of a machine, assumed or fitted to measurements.

One sum serves both: what `hf-stable bench --plan` works out for a GPU is what `hf-stable bench
scale` fits here and checks at sizes that the fit has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from hf_stable._wording import extra_needed
from hf_stable.commands.bench.cost_model import Cost

__all__ = ["MACHINES", "Machine"]


@dataclass(frozen=True)
class Machine:
    """One process's share of a cluster.

    Seconds are a sum: each amount of work at its rate, and a fixed time for each operation. That
    takes nothing to overlap within a part. `bench_scale` fits the same sum to what it measures.

    Attributes:
        name: what it is.
        flops: of matrix products, per second, as reached in training.
        bandwidth: bytes per second between memory and processor, as reached entry by entry.
        products: bytes per second that a product of a matrix with a vector reads.
        network: bytes per second that a process sends in a collective.
        latency: seconds for a collective of no size.
        launch: seconds for a small operation.
    """

    name: str
    flops: float
    bandwidth: float
    products: float
    network: float
    latency: float
    launch: float

    @classmethod
    def fit(
        cls,
        name: str,
        computing: Sequence[tuple[Cost, float]],
        communicating: Sequence[tuple[Cost, int, float]] = (),
    ) -> Self:
        """Return the machine whose seconds are the closest to measured ones.

        Args:
            name: of the machine.
            computing: costs with the seconds that computing them took; errors count relative.
            communicating: costs with the number of processes and the seconds between them.
        """
        flops, bandwidth, products, launch = _fit_times(
            [(cost.computing, seconds) for cost, seconds in computing], 4
        )
        network, latency = _fit_times(
            [(cost.communicating(number), seconds) for cost, number, seconds in communicating], 2
        )
        return cls(
            name,
            flops=_rate(flops),
            bandwidth=_rate(bandwidth),
            products=_rate(products),
            network=_rate(network),
            latency=latency,
            launch=launch,
        )

    def seconds(self, cost: Cost, num_processes: int) -> tuple[float, float]:
        """Return the seconds of a part: computing, and communicating."""
        flops, entries, products, launches = cost.computing
        computing = flops / self.flops + entries / self.bandwidth + products / self.products
        sent, calls = cost.communicating(num_processes)
        return computing + launches * self.launch, sent / self.network + calls * self.latency


ROUNDING = 1e-12
"""Share of a measured time below which an amount that explains it is one of rounding."""


def _rate(time: float) -> float:
    return 1 / time if time else math.inf


def _fit_times(points: Sequence[tuple[tuple[float, ...], float]], size: int) -> list[float]:
    """Return times per unit, none negative, that come the closest to the seconds (relative).

    Raises:
        ModuleNotFoundError: if scipy is not installed, saying how to get it.
    """
    if not points:
        return [0.0] * size
    try:
        from scipy.optimize import nnls
    except ModuleNotFoundError as error:
        raise extra_needed("fitting a machine", "bench", error) from error
    amounts, seconds = (
        torch.tensor(each, dtype=torch.float64) for each in zip(*points, strict=True)
    )
    rows = amounts / seconds[:, None]
    scale = rows.amax(0)  # amounts differ by ten orders of magnitude
    scale[scale == 0] = 1
    times, _ = nnls((rows / scale).numpy(), torch.ones(len(rows)).double().numpy())
    times[times < ROUNDING] = 0
    return (torch.from_numpy(times) / scale).tolist()


MACHINES = {
    name: Machine(title, 0.4 * flops, 0.8 * memory, 0.8 * memory, 0.8 * network, 3e-5, 5e-6)
    for name, title, flops, memory, network in (
        ("a100", "A100 80 GB, 200 Gbit/s", 312e12, 2.0e12, 25e9),
        ("h100", "H100 SXM, 400 Gbit/s", 989e12, 3.35e12, 50e9),
    )
}
"""Data sheets: 40 % of the peak in bfloat16, 80 % of the memory's, 80 % of the network's. Not
measured by us."""

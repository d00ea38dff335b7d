"""A call of compiled code: the tables that it reads, and the threads that it runs on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_stable.kernels import tables as t
from hf_stable.kernels.plans import Plan
from hf_stable.kernels.threads import run_on_threads, yielding
from hf_stable.measures.matrices import spectral_dtype

__all__ = ["KINDS", "Call"]

KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
"""Dtypes of weights that are compiled for."""


class Call:
    """One call of compiled code: its head, and the tables that it points to."""

    def __init__(self, dtype: torch.dtype, plan: Plan) -> None:
        """Fill in what a plan says, and find the code for a dtype of weights."""
        from hf_stable.kernels.compiling import compiled  # imports numba: half a second

        self.plan = plan
        self.kept: list[np.ndarray] = []
        self.lead = compiled(f"lead_{KINDS[spectral_dtype(dtype)]}").address
        self.head = np.zeros(t.HEAD_SIZE, dtype=np.int64)
        self.head[t.WORKER] = compiled(f"work_{KINDS[dtype]}").address
        self.head[t.YIELD] = yielding()
        self.head[t.SIZE] = dtype.itemsize
        self.head[t.REAL_SIZE] = spectral_dtype(dtype).itemsize
        self.head[t.NUM_BATCHES] = len(plan.batches)
        self.weights = np.zeros((len(plan.weights), t.WEIGHT_SIZE), dtype=np.int64)
        self.weights[:, t.WIDTH : t.WIDTH + plan.weights.shape[1]] = plan.weights
        self.parts = np.zeros((len(plan.parts), t.PART_SIZE), dtype=np.int64)
        self.parts[:, : plan.parts.shape[1]] = plan.parts
        for place, table in (
            (t.WEIGHTS, self.weights), (t.CHUNKS, plan.chunks),
            (t.PIECES, plan.pieces), (t.PARTS, self.parts), (t.BATCHES, plan.batches),
            (t.SHARES, plan.shares), (t.VALUES, np.zeros((len(plan.parts), t.VALUE_SIZE))),
        ):  # fmt: skip
            self.hand(place, table)

    def hand(self, place: int, array: np.ndarray) -> None:
        """Hand over an array by its address."""
        self.kept.append(array)
        self.head[place] = array.__array_interface__["data"][0]

    def run(
        self, kind: int, options: np.ndarray, updates: Tensor, sums: Tensor, products: Tensor
    ) -> None:
        """Do all that a call of a kind does, in the room that there is."""
        head = self.head
        head[t.OPTIONS] = options.__array_interface__["data"][0]
        head[t.KIND], head[t.TASK], head[t.BATCH] = kind, t.START, -1
        head[t.BEGIN] = head[t.DONE] = head[t.FRONT] = head[t.BACK] = head[t.COME] = 0
        head[t.LEFT] = head[t.END] = 1
        for place, room in (
            (t.UPDATES, updates),
            (t.SUMS, sums),
            (t.PRODUCTS, products),
        ):
            head[place] = room.data_ptr()
        head[t.AREA_OF_SUMS], head[t.AREA_OF_PRODUCTS] = self.plan.area[1:]
        head[t.TEAM] = threads = min(torch.get_num_threads(), self.plan.most_threads)
        run_on_threads(self.lead, head.__array_interface__["data"][0], threads)

"""What StabilityCallback exchanges between processes. Nothing else of its cost is counted here."""

from __future__ import annotations

from hf_stable.commands.bench.cost_model import Collective, Cost
from hf_stable.commands.bench.layouts import FLOAT
from hf_stable.commands.bench.shapes import ModelShape

__all__ = ["monitor_costs"]

SIZE = 8
"""Bytes in which a process says how long its records are."""

RECORD_BYTES = (240, 187, 48)
"""Bytes of what a process has recorded, as pickled: of all, of a block, and of a head. They are
those of the default terms of a GPT-2."""


def monitor_costs(shape: ModelShape, num_processes: int) -> dict[str, Cost]:
    """Return what the monitor exchanges, the same however a model is shared.

    Weights are not gathered for it: a block that ZeRO 3 has once seen using those of its layers
    gathers them itself from then on.

    Args:
        shape: of the model.
        num_processes: that take part.

    Returns:
        By name: "monitor" (at each step, the loss and whether all is finite) and "probe" (at a step
        that is probed, the records of every process).
    """
    if num_processes == 1:
        return {name: Cost(name) for name in ("monitor", "probe")}
    fixed, of_block, of_head = RECORD_BYTES
    record = fixed + of_block * shape.layers + of_head * shape.heads
    loss = Collective("all-reduce", 1, 2 * FLOAT)
    lengths, records = (
        Collective("all-gather", 1, size * num_processes) for size in (SIZE, record)
    )
    return {
        "monitor": Cost("monitor", collectives=(loss,)),
        "probe": Cost("probe", collectives=(lengths, records)),
    }

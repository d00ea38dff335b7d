"""The last micro-batches of a process, by reference or as copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hf_stable.monitor.batches.suspects import STEPS

__all__ = ["BatchRing", "KeepBatches", "MicroBatch", "copied_to_cpu"]

KeepBatches = Literal["auto"] | int
"""How many micro-batches are kept: a number, of copies; "auto", references to the last ones."""


@dataclass
class MicroBatch:
    """What went into one forward and backward of one process.

    Attributes:
        step: optimizer step that it is a part of.
        number: of it in the step, from 0.
        epoch: in which it came, from 0.
        inputs: as the data loader made them.
        positions: of its samples in the data set; None where they are not known.
        loss: (), its share of the step's loss, once it is known.
    """

    step: int
    number: int
    epoch: int
    inputs: Mapping[str, Any]
    positions: list[int] | None = None
    loss: Tensor | None = None


class BatchRing:
    """Holds the last micro-batches.

    Args:
        keep: 0 for none; a number, of copies in the memory of the CPU; "auto" for references to
            those of the last `STEPS` steps, which stay where they are.
    """

    def __init__(self, keep: KeepBatches) -> None:
        """Begin empty."""
        self.keep = keep
        self._held: list[MicroBatch] = []

    def add(self, batch: MicroBatch) -> None:
        """Add one, and let the oldest go."""
        if self.keep == "auto":
            self._held = [each for each in self._held if each.step > batch.step - STEPS]
        else:
            batch.inputs = copied_to_cpu(batch.inputs)
            self._held = self._held[max(0, len(self._held) + 1 - self.keep) :]
        self._held.append(batch)

    def note_loss(self, loss: Tensor) -> None:
        """Take the loss of the last one, without its graph."""
        if self._held:
            self._held[-1].loss = loss.detach()

    def held(self) -> list[MicroBatch]:
        """Return them, the oldest first."""
        return list(self._held)

    def clear(self) -> None:
        """Let all go."""
        self._held = []


def copied_to_cpu(value: Any) -> Any:
    """Return tensors, and containers of them, as copies that nobody else writes into."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied_to_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [copied_to_cpu(entry) for entry in value]
    return value

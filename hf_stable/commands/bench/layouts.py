"""How processes share a model, and what they exchange for that: kinds, calls and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hf_stable._wording import nearest
from hf_stable.commands.bench.shapes import ModelShape

__all__ = ["FLOAT", "LOW", "Collective", "Layout", "Strategy", "exchanged_in_training"]

Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]

FLOAT = 4
"""Bytes of a weight, gradient, moment or vector: the master copy is float32."""

LOW = 2
"""Bytes of a weight as FSDP2 gathers it under a bfloat16 policy, and as DeepSpeed has it."""

TENSOR_PARALLEL_CALLS = 7
"""All-reduces of activations in a block that tensor parallelism cuts: of attention and of the MLP
forward, of the gradients of q, k, v, gate and up backward."""


@dataclass(frozen=True)
class Collective:
    """Calls of one kind per step.

    Attributes:
        kind: "all-reduce", "all-gather" or "reduce-scatter".
        count: number of calls.
        bytes: size of the whole tensor of all of them, not of a rank's part.
        among: processes that take part in one; None for all there are.
    """

    kind: str
    count: int
    bytes: float
    among: int | None = None


@dataclass(frozen=True)
class Layout:
    """How processes share a model, and its tokens.

    Attributes:
        num_processes: all of them.
        strategy: of the processes that see different tokens: "ddp", "fsdp2", or a stage of
            DeepSpeed ZeRO ("zero1" to "zero3").
        tensor_parallel: processes that cut each matrix and see the same tokens.
        replicas: copies of a model that FSDP2 shards (HSDP).
    """

    num_processes: int
    strategy: Strategy = "fsdp2"
    tensor_parallel: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.num_processes, self.tensor_parallel, self.replicas) < 1:
            raise ValueError(f"{self}: every number must be at least 1")
        known = get_args(Strategy)
        if self.strategy not in known:
            raise ValueError(
                f"strategy={self.strategy!r} is not allowed{nearest(self.strategy, known)}; choose "
                f"one of {', '.join(map(repr, known))}"
            )
        if self.strategy == "ddp" and self.replicas > 1:
            raise ValueError("replicas are of what FSDP2 shards; under ddp every process is one")
        if self.stage and max(self.replicas, self.tensor_parallel) > 1:
            raise ValueError(
                f"{self.strategy} goes with replicas=1 and tensor_parallel=1: under DeepSpeed a "
                "patched model trains with neither. Choose 'fsdp2' for both"
            )
        if self.num_processes % (self.tensor_parallel * self.replicas):
            raise ValueError(
                f"{self.num_processes} processes do not part into tensor_parallel="
                f"{self.tensor_parallel} times replicas={self.replicas}"
            )

    @property
    def batches(self) -> int:
        """Processes that see different tokens."""
        return self.num_processes // self.tensor_parallel

    @property
    def stage(self) -> int:
        """The stage of ZeRO; 0 for what is not DeepSpeed's."""
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else 0

    @property
    def is_engine(self) -> bool:
        """Whether DeepSpeed's engine exchanges anything."""
        return self.stage > 0 and self.batches > 1

    @property
    def shards(self) -> int:
        """Parts into which what a process has of a model is cut for the optimizer."""
        return 1 if self.strategy == "ddp" else self.batches // self.replicas

    @property
    def share(self) -> float:
        """What part of the model's weights a process steps."""
        return 1 / (self.shards * self.tensor_parallel)

    @property
    def held(self) -> float:
        """What part of the model's weights a process has between the steps."""
        return 1.0 if self.stage in (1, 2) else self.share

    @property
    def state(self) -> float:
        """Bytes that a process holds for a parameter, with its gradient.

        DeepSpeed has both in bfloat16, and float32 masters of what it steps.
        """
        if not self.stage:
            return 2 * FLOAT * self.share
        gradients = 1.0 if self.stage == 1 else self.share
        return LOW * (self.held + gradients) + FLOAT * self.share

    def reductions(self, count: int, size: float) -> tuple[Collective, ...]:
        """Return the collectives of power iterations.

        Args:
            count: of iterations that need one each.
            size: bytes of all their vectors.

        Returns:
            One after another over each set of processes that cuts the matrices. Tensor parallelism
            cuts columns too: there one more comes before each, and both share the vectors.
        """
        calls = count * (2 if self.tensor_parallel > 1 else 1)
        return tuple(
            Collective("all-reduce", calls, size, among)
            for among in (self.shards, self.tensor_parallel)
            if among > 1
        )


def exchanged_in_training(shape: ModelShape, layout: Layout, tokens: int) -> tuple[Collective, ...]:
    """Return the collectives of forward and backward, which a step has without us too.

    Those of DeepSpeed are counted in `zero`.

    Args:
        shape: of the model.
        layout: of the processes.
        tokens: of all processes in one step.
    """
    return (*_activations(shape, layout, tokens), *_weights_and_gradients(shape, layout))


def _activations(shape: ModelShape, layout: Layout, tokens: int) -> tuple[Collective, ...]:
    """Return what tensor parallelism exchanges; what heads gather is left out."""
    if layout.tensor_parallel == 1:
        return ()
    calls = TENSOR_PARALLEL_CALLS * shape.layers + 2  # of the embedding and of the head
    size = LOW * calls * tokens / layout.batches * shape.hidden
    return (Collective("all-reduce", calls, size, layout.tensor_parallel),)


def _weights_and_gradients(shape: ModelShape, layout: Layout) -> tuple[Collective, ...]:
    """Return what data parallelism exchanges."""
    held, shards = shape.num_parameters / layout.tensor_parallel, layout.shards
    if shards == 1:
        averaged = Collective("all-reduce", 1, FLOAT * held, layout.batches)
        return (averaged,) if layout.batches > 1 else ()
    # Blocks are gathered for the forward and again for the backward, the rest stays from one to
    # the other.
    gathered = held + shape.in_blocks / layout.tensor_parallel
    found = (
        Collective("all-gather", 2 * shape.layers + 1, LOW * gathered, shards),
        Collective("reduce-scatter", shape.layers + 1, FLOAT * held, shards),
    )
    if layout.replicas == 1:
        return found
    return (
        *found,
        Collective("all-reduce", shape.layers + 1, FLOAT * held / shards, layout.replicas),
    )

"""What a training step costs on many processes: flops, bytes of memory, collectives. Counts only.

All counts follow from the shapes of a model's weights (`shapes`). Seconds need the rates of a
machine, which `machines` has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_stable.commands.bench.shapes import ModelShape, measure_shape

__all__ = [
    "Collective",
    "Cost",
    "Layout",
    "ModelShape",
    "Strategy",
    "measure_shape",
    "step_costs",
]

Strategy = Literal["ddp", "fsdp2"]

FLOAT = 4
"""Bytes of a weight, gradient, moment or vector: the master copy is float32."""

LOW = 2
"""Bytes of a weight as FSDP2 gathers it under a bfloat16 policy."""

ADAMW_PASSES = 7
"""Arrays that a fused AdamW reads (weight, gradient, two moments) and writes (all but one)."""

ADAMW2_OWN_PASSES = 4
"""Arrays beyond AdamW's: the target is zeroed, and the step reads weight and target and writes."""

STEP_PASSES = 2
"""Times that a power iteration reads a matrix: W v, then W^T u."""

ITERATION_LAUNCHES = 2
"""Operations per matrix of a power iteration: a product from either side."""

BLOCK_LAUNCHES = 60
"""Operations of a block, forward and backward: 40 of a ViT, 80 of a GPT-2 whose GELU is spelled
out."""


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
class Cost:
    """What one part of a step costs on each process.

    Attributes:
        part: its name.
        flops: floating point operations.
        bytes: bytes moved between memory and processor by operations entry by entry; no bytes at
            all where flops decide.
        product_bytes: bytes read by products of a matrix with a vector.
        launches: small operations in a row, each of which costs a kernel's launch.
        collectives: what goes between processes.
        state: bytes held between steps.
        working: bytes held for a while within the step.
    """

    part: str
    flops: float = 0.0
    bytes: float = 0.0
    product_bytes: float = 0.0
    launches: int = 0
    collectives: tuple[Collective, ...] = ()
    state: float = 0.0
    working: float = 0.0

    @property
    def moved(self) -> float:
        """Bytes moved between memory and processor in all."""
        return self.bytes + self.product_bytes

    @property
    def computing(self) -> tuple[float, float, float, float]:
        """What its seconds are made of: flops, bytes, bytes of products, launches."""
        return (0.0 if self.moved else self.flops), self.bytes, self.product_bytes, self.launches

    def communicating(self, num_processes: int) -> tuple[float, float]:
        """Return what its seconds between processes are made of: bytes sent by each, and calls."""
        if num_processes == 1:
            return 0.0, 0.0
        sent = 0.0
        for each in self.collectives:
            among = each.among or num_processes
            # In a ring, an all-reduce is a reduce-scatter and then an all-gather.
            rounds = 2 if each.kind == "all-reduce" else 1
            sent += rounds * each.bytes * (among - 1) / among
        return sent, float(sum(each.count for each in self.collectives))


@dataclass(frozen=True)
class Layout:
    """How processes share a model, and its tokens.

    Attributes:
        num_processes: all of them.
        strategy: "ddp" or "fsdp2", of the processes that see different tokens.
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
        if self.strategy not in ("ddp", "fsdp2"):
            raise ValueError(f"strategy={self.strategy!r} is not allowed; choose 'ddp' or 'fsdp2'")
        if self.strategy == "ddp" and self.replicas > 1:
            raise ValueError("replicas are of what FSDP2 shards; under ddp every process is one")
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
    def shards(self) -> int:
        """Parts into which FSDP2 cuts what a process has of a model."""
        return self.batches // self.replicas if self.strategy == "fsdp2" else 1

    @property
    def share(self) -> float:
        """What part of the model's weights a process holds."""
        return 1 / (self.shards * self.tensor_parallel)

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


def step_costs(
    shape: ModelShape,
    *,
    num_processes: int,
    tokens: int,
    strategy: Strategy = "fsdp2",
    power_iterations: int = 1,
    tensor_parallel: int = 1,
    replicas: int = 1,
) -> dict[str, Cost]:
    """Return what each part of one optimizer step costs a process.

    Args:
        shape: of the model.
        num_processes: among which the tokens are divided, and under FSDP2 everything else.
        tokens: of all processes in one step.
        strategy: "ddp" (weights whole everywhere) or "fsdp2" (rows sharded).
        power_iterations: AdamW2's setting.
        tensor_parallel: processes that cut each matrix of a block and see the same tokens.
        replicas: copies of the model under FSDP2 (HSDP).

    Returns:
        By name: "model" (forward and backward), "AdamW", "AdamW2" (in AdamW's place) and
        "sigmaReparam" (the refresh behind the step, and what tensor parallelism exchanges in the
        backward; the forward's scaling is in the noise).

    Raises:
        ValueError: if a number is not positive or they do not fit, or the strategy is unknown.
    """
    if num_processes < 1 or tokens < 1 or power_iterations < 1:
        raise ValueError(
            f"num_processes={num_processes}, tokens={tokens} and "
            f"power_iterations={power_iterations} must all be at least 1"
        )
    layout = Layout(num_processes, strategy, tensor_parallel, replicas)
    # AdamW2 iterates W and U together, and once more U alone.
    iterations = 2 * power_iterations + 1
    return {
        "model": _training_cost(shape, layout, tokens),
        "AdamW": _adamw_cost(shape, layout.share),
        "AdamW2": _adamw2_cost(shape, layout, iterations, power_iterations + 1),
        "sigmaReparam": _refresh_cost(shape, layout),
    }


def _training_cost(shape: ModelShape, layout: Layout, tokens: int) -> Cost:
    """Return the cost of forward and backward."""
    per_token = 6 * shape.multiplied + 12 * shape.layers * shape.hidden * shape.sequence
    exchanged = (*_activations(shape, layout, tokens), *_exchange(shape, layout))
    return Cost(
        "model",
        flops=per_token * tokens / layout.num_processes,
        launches=BLOCK_LAUNCHES * shape.layers,
        collectives=exchanged,
        state=2 * FLOAT * shape.num_parameters * layout.share,
    )


def _adamw_cost(shape: ModelShape, share: float) -> Cost:
    size = shape.num_parameters * share
    return Cost(
        "AdamW",
        bytes=ADAMW_PASSES * FLOAT * size,
        launches=len(shape.bounded),
        state=2 * FLOAT * size,
    )


def _adamw2_cost(shape: ModelShape, layout: Layout, iterations: int, reductions: int) -> Cost:
    share = layout.share
    size, bounded = shape.num_parameters * share, _entries(shape.bounded)
    exchanged = FLOAT * iterations * _vectors(shape.bounded)
    return Cost(
        "AdamW2",
        flops=4 * iterations * bounded * share,
        bytes=FLOAT * (ADAMW_PASSES * size + ADAMW2_OWN_PASSES * bounded * share),
        product_bytes=FLOAT * STEP_PASSES * iterations * bounded * share,
        launches=ITERATION_LAUNCHES * iterations * len(shape.bounded),
        collectives=layout.reductions(reductions, exchanged),
        state=2 * FLOAT * size + FLOAT * 2 * sum(columns for _, columns in shape.bounded),
        working=FLOAT * (bounded * share if share < 1 else max(map(_numel, shape.bounded))),
    )


def _refresh_cost(shape: ModelShape, layout: Layout) -> Cost:
    patched, vectors = _entries(shape.patched), _vectors(shape.patched)
    collectives = layout.reductions(1, FLOAT * vectors)
    if layout.tensor_parallel > 1:  # <dL/dW_hat, W>, where the backward needs it
        number = len(shape.patched)
        products = Collective("all-reduce", number, FLOAT * number, layout.tensor_parallel)
        collectives = (products, *collectives)
    return Cost(
        "sigmaReparam",
        flops=4 * patched * layout.share,
        product_bytes=STEP_PASSES * FLOAT * patched * layout.share,
        launches=ITERATION_LAUNCHES * len(shape.patched),
        collectives=collectives,
        state=FLOAT * vectors,
    )


def _activations(shape: ModelShape, layout: Layout, tokens: int) -> tuple[Collective, ...]:
    """Return what tensor parallelism exchanges without us; what heads gather is left out."""
    if layout.tensor_parallel == 1:
        return ()
    calls = TENSOR_PARALLEL_CALLS * shape.layers + 2  # of the embedding and of the head
    size = LOW * calls * tokens / layout.batches * shape.hidden
    return (Collective("all-reduce", calls, size, layout.tensor_parallel),)


def _exchange(shape: ModelShape, layout: Layout) -> tuple[Collective, ...]:
    """Return what data parallelism exchanges without us."""
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


def _numel(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _entries(shapes: tuple[tuple[int, int], ...]) -> int:
    return sum(map(_numel, shapes))


def _vectors(shapes: tuple[tuple[int, int], ...]) -> int:
    return sum(rows + columns for rows, columns in shapes)

"""What a training step costs each of many processes: flops, bytes of memory. Counts only.

All counts follow from the shapes of a model's weights (`shapes`) and from how the processes share
it, which says what goes between them (`layouts`). Seconds need the rates of a machine, which
`machines` has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_stable.commands.bench.layouts import (
    FLOAT,
    Collective,
    Layout,
    Strategy,
    exchanged_in_training,
)
from hf_stable.commands.bench.shapes import ModelShape, measure_shape
from hf_stable.commands.bench.zero import (
    engine_exchange,
    groups_exchange,
    iterations_exchange,
    refresh_exchange,
    stepped,
)

__all__ = [
    "Collective",
    "Cost",
    "Layout",
    "ModelShape",
    "Strategy",
    "measure_shape",
    "step_costs",
]

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
        strategy: "ddp" (weights whole everywhere), "fsdp2" (rows sharded) or "zero1" to "zero3"
            (DeepSpeed, which cuts flat tensors).
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
    """Return the cost of forward and backward, and of what an engine exchanges after them."""
    per_token = 6 * shape.multiplied + 12 * shape.layers * shape.hidden * shape.sequence
    return Cost(
        "model",
        flops=per_token * tokens / layout.num_processes,
        launches=BLOCK_LAUNCHES * shape.layers,
        collectives=engine_exchange(shape, layout)
        if layout.is_engine
        else exchanged_in_training(shape, layout, tokens),
        state=layout.state * shape.num_parameters,
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
    collectives = layout.reductions(reductions, FLOAT * iterations * _vectors(shape.bounded))
    if layout.is_engine:
        own = iterations_exchange(shape, layout, iterations, reductions)
        collectives = (*own, *groups_exchange(shape, layout))
    matrices = _matrices_here(shape, layout)
    return Cost(
        "AdamW2",
        flops=4 * iterations * bounded * share,
        bytes=FLOAT * (ADAMW_PASSES * size + ADAMW2_OWN_PASSES * bounded * share),
        product_bytes=FLOAT * STEP_PASSES * iterations * bounded * share,
        launches=round(ITERATION_LAUNCHES * iterations * sum(n for _, n in matrices)),
        collectives=collectives,
        state=2 * FLOAT * (size + sum(columns * n for (_, columns), n in matrices)),
        working=FLOAT * (bounded * share if share < 1 else max(map(_numel, shape.bounded))),
    )


def _matrices_here(shape: ModelShape, layout: Layout) -> Iterable[tuple[tuple[int, int], float]]:
    """Return the matrices that a process iterates on, and how many such it has.

    ZeRO 1 and 2 leave most of them whole, on one process each: a share of them is here.
    """
    if layout.stage not in (1, 2):
        return [(matrix, 1.0) for matrix in shape.bounded]
    return [
        (matrix, 1.0 if weight in part.shared else layout.share)
        for part in stepped(shape, layout)
        for weight in part.weights
        for matrix in weight.matrices
    ]


def _refresh_cost(shape: ModelShape, layout: Layout) -> Cost:
    patched, vectors = _entries(shape.patched), _vectors(shape.patched)
    collectives = layout.reductions(1, FLOAT * vectors)
    if layout.is_engine:
        collectives = refresh_exchange(shape, layout)
    if layout.tensor_parallel > 1:  # <dL/dW_hat, W>, where the backward needs it
        number = len(shape.patched)
        products = Collective("all-reduce", number, FLOAT * number, layout.tensor_parallel)
        collectives = (products, *collectives)
    return Cost(
        "sigmaReparam",
        flops=4 * patched * layout.held,
        product_bytes=STEP_PASSES * FLOAT * patched * layout.held,
        launches=ITERATION_LAUNCHES * len(shape.patched),
        collectives=collectives,
        state=FLOAT * vectors,
    )


def _numel(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _entries(shapes: tuple[tuple[int, int], ...]) -> int:
    return sum(map(_numel, shapes))


def _vectors(shapes: tuple[tuple[int, int], ...]) -> int:
    return sum(rows + columns for rows, columns in shapes)

"""What processes exchange under DeepSpeed ZeRO: its engine, and AdamW2 and sigmaReparam within it.

DeepSpeed's own sizes are those it has where a config says nothing, and it trains in bfloat16. It
steps one flat tensor after the other, of a group of parameters, or under ZeRO 3 of a part of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from hf_stable.commands.bench.layouts import FLOAT, LOW, Collective, Layout
from hf_stable.commands.bench.shapes import ModelShape, WeightShape

__all__ = [
    "Stepped",
    "engine_exchange",
    "groups_exchange",
    "iterations_exchange",
    "refresh_exchange",
    "stepped",
]

REDUCED = 500_000_000
"""Entries of gradients in one reduction (`reduce_bucket_size`)."""

PREFETCHED = 50_000_000
"""Entries of weights that one all-gather brings at least (`stage3_prefetch_bucket_size`)."""

REUSED = 1_000_000_000
"""Weights that come back before so many entries are not let go (`stage3_max_reuse_distance`)."""

PERSISTENT = 100_000
"""Parameters up to this size stay whole (`stage3_param_persistence_threshold`)."""

STEPPED = 1_000_000_000
"""Entries here that ZeRO 3 steps as one flat tensor (`sub_group_size`)."""

ALIGNMENT = 2
"""Entries to a multiple of which ZeRO 1 and 2 fill up the part of a process."""

NORM = {1: 4, 2: 4, 3: 8}
"""Bytes of the norm of the gradients of a group, by the stage."""

GIVEN_GROUPS = 2
"""Groups of an optimizer that knows decayed parameters and others; AdamW2 parts them further."""


@dataclass(frozen=True)
class Stepped:
    """A flat tensor that an optimizer steps at once.

    Attributes:
        weights: that lie in it, on any process.
        shared: those of them that are cut over processes and that AdamW2 bounds.
        splits_rows: whether a cut is within a row of any of these.
    """

    weights: tuple[WeightShape, ...]
    shared: tuple[WeightShape, ...]
    splits_rows: bool

    @property
    def num_rates(self) -> int:
        """Matrices that AdamW2 gives a rate of its own."""
        return sum(len(weight.matrices) for weight in self.weights)


def stepped(shape: ModelShape, layout: Layout) -> list[Stepped]:
    """Return the flat tensors of an optimizer whose groups are AdamW2's."""
    if layout.stage < 3:
        return [_cut(group, _cuts_of_group(group, layout.batches)) for group in shape.groups]
    return [
        _cut(part, [_cuts_of_weight(weight, layout.batches) for weight in part])
        for group in shape.groups
        for part in _filled(group, STEPPED, lambda weight: _held(weight.numel, layout.batches))
    ]


def engine_exchange(shape: ModelShape, layout: Layout) -> tuple[Collective, ...]:
    """Return what the engine exchanges in a step whose optimizer has `GIVEN_GROUPS` groups."""
    weights = shape.weights
    reduced = sum(1 for _ in _packed(weights, REDUCED))
    if layout.stage < 3:
        return (
            Collective("all-reduce", reduced, LOW * shape.num_parameters),
            Collective("all-reduce", GIVEN_GROUPS, NORM[layout.stage] * GIVEN_GROUPS),
            Collective("all-reduce", 1, 1),  # whether any gradient overflows
            Collective("all-gather", GIVEN_GROUPS, LOW * shape.num_parameters),
        )
    padded = _padded(weights, layout.batches)
    kept = [weight for weight in weights if weight.numel <= PERSISTENT]
    found = (
        *_gathers(shape, layout.batches),
        Collective("reduce-scatter", reduced, LOW * padded),
        Collective("all-reduce", GIVEN_GROUPS, NORM[layout.stage] * GIVEN_GROUPS),
    )
    # Each parameter that stays whole is gathered for itself once it has moved.
    own = Collective("all-gather", len(kept), LOW * _padded(kept, layout.batches))
    return (*found, own) if kept else found


def iterations_exchange(
    shape: ModelShape, layout: Layout, iterations: int, reductions: int
) -> tuple[Collective, ...]:
    """Return what the power iterations of AdamW2 exchange, and that all processes know all rates.

    Args:
        shape: of the model.
        layout: of the processes.
        iterations: power iterations on each bounded matrix, of the weight and of the update.
        reductions: those of them that are made one after the other.
    """
    parts = stepped(shape, layout)
    calls = sum(reductions * (1 + part.splits_rows) for part in parts if part.shared)
    vectors = sum(weight.vectors for part in parts for weight in part.shared)
    ruled = [part.num_rates for part in parts if part.num_rates]
    of_rates = Collective("all-reduce", len(ruled), FLOAT * sum(ruled))
    if not calls:
        return (of_rates,)
    return Collective("all-reduce", calls, FLOAT * iterations * vectors), of_rates


def groups_exchange(shape: ModelShape, layout: Layout) -> tuple[Collective, ...]:
    """Return what the engine exchanges more for AdamW2, which has more groups than were given."""
    more = max(0, len(stepped(shape, layout)) - GIVEN_GROUPS)
    norms = Collective("all-reduce", more, NORM[layout.stage] * more)
    # The weights of more groups come in more all-gathers, and are as many bytes.
    return (norms, Collective("all-gather", more, 0.0)) if layout.stage < 3 else (norms,)


def refresh_exchange(shape: ModelShape, layout: Layout) -> tuple[Collective, ...]:
    """Return what the refresh of sigma exchanges, and what gamma adds to the engine's exchange.

    Up to ZeRO 2 every process has the weights whole, and gamma travels with them.
    """
    if layout.stage < 3 or not shape.reparametrised:
        return ()
    cuts = [_cuts_of_weight(weight, layout.batches) for weight in shape.reparametrised]
    found = _cut(shape.reparametrised, cuts)
    vectors = sum(weight.vectors for weight in found.shared)
    gammas = [len(weight.matrices) for weight in shape.reparametrised]
    size = sum(_held(numel, layout.batches) for numel in gammas) * layout.batches
    return (
        Collective("all-reduce", 1 + found.splits_rows, FLOAT * vectors),
        Collective("all-gather", len(gammas), LOW * size),
    )


def _gathers(shape: ModelShape, among: int) -> Iterator[Collective]:
    """Yield the all-gathers of the forward and of the backward of ZeRO 3."""
    for each in ([w for w in shape.weights if w.numel > PERSISTENT], _let_go(shape)):
        if each:
            count = sum(1 for _ in _filled(each, PREFETCHED, lambda weight: weight.numel))
            yield Collective("all-gather", count, LOW * _padded(each, among))


def _let_go(shape: ModelShape) -> list[WeightShape]:
    """Return the weights that ZeRO 3 lets go after the forward, and gathers again.

    The backward comes back to a weight after twice what lies behind it in the model. That a tied
    embedding is needed in between, and may be gathered once more, is left out.
    """
    behind, found = sum(weight.numel for weight in shape.weights), []
    for weight in shape.weights:
        behind -= weight.numel
        if weight.numel > PERSISTENT and 2 * behind >= REUSED:
            found.append(weight)
    return found


def _cut(weights: Sequence[WeightShape], cuts: Iterable[range]) -> Stepped:
    shared = [
        (weight, own) for weight, own in zip(weights, cuts, strict=True) if own and weight.matrices
    ]
    splits = any(cut % weight.width for weight, own in shared for cut in own)
    return Stepped(tuple(weights), tuple(weight for weight, _ in shared), splits)


def _cuts_of_group(group: Sequence[WeightShape], among: int) -> Iterator[range]:
    """Yield where each weight of a group is cut that lie one behind the other."""
    unit = ALIGNMENT * among
    part = ALIGNMENT * -(-sum(weight.numel for weight in group) // unit)
    start = 0
    for weight in group:
        yield range(part - start % part, weight.numel, part)
        start += weight.numel


def _cuts_of_weight(weight: WeightShape, among: int) -> range:
    own = _held(weight.numel, among)
    return range(own, weight.numel, own)


def _held(numel: int, among: int) -> int:
    return -(-numel // among)


def _padded(weights: Iterable[WeightShape], among: int) -> int:
    return sum(_held(weight.numel, among) * among for weight in weights)


def _packed(weights: Iterable[WeightShape], most: int) -> Iterator[list[WeightShape]]:
    """Yield weights that have room together."""
    together: list[WeightShape] = []
    for weight in weights:
        if together and sum(each.numel for each in together) + weight.numel > most:
            yield together
            together = []
        together.append(weight)
    if together:
        yield together


def _filled(
    weights: Iterable[WeightShape], least: int, size: Callable[[WeightShape], int]
) -> Iterator[list[WeightShape]]:
    """Yield weights until each lot has reached a size."""
    together: list[WeightShape] = []
    for weight in weights:
        together.append(weight)
        if sum(map(size, together)) >= least:
            yield together
            together = []
    if together:
        yield together

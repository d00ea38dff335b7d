"""How two checkpoints of the same model differ, matrix by matrix and head by head."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.block_inspection import BlockSpectrum, inspect_blocks, outline
from hf_stable.spectral import as_matrix, leading_triple
from hf_stable.weight_files import WeightFiles, open_weights

__all__ = ["CheckpointComparison", "HeadChange", "MatrixChange", "compare_checkpoints"]

SIGMA_TOLERANCE = 1e-4


@dataclass(frozen=True)
class MatrixChange:
    """One matrix in both checkpoints.

    Attributes:
        name: of the layer, in the model where that is known, else on disk.
        sigma: largest singular value of the effective weight before and after; None where it has
            NaN or infinite entries.
        distance: Frobenius norm of the difference over that of the first; None likewise.
    """

    name: str
    sigma: tuple[float | None, float | None]
    distance: float | None


@dataclass(frozen=True)
class HeadChange:
    """One attention head in both checkpoints: sigma_1(Wq^T Wk) and SEC, before and after."""

    block: str
    head: int
    sigma_qk: tuple[float, float]
    sec: tuple[float, float]


@dataclass(frozen=True)
class CheckpointComparison:
    """What `compare_checkpoints` found.

    Attributes:
        paths: the two checkpoints.
        matrices: those in both with the same shape, the most changed first.
        heads: those in both, the most grown first; empty if the architecture is not known.
        only_first: tensors that only the first has, or that have another shape in the second.
        only_second: the other way round.
    """

    paths: tuple[str, str]
    matrices: tuple[MatrixChange, ...]
    heads: tuple[HeadChange, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Return whether both hold the same weights."""
        same = all(change.distance == 0 for change in self.matrices)
        return same and not self.only_first and not self.only_second

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self) | {"is_same": self.is_same}


def compare_checkpoints(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> CheckpointComparison:
    """Compare two checkpoints, two tensors in memory at a time; no model is built.

    Args:
        first: folder or file, as for `open_weights`; patched, folded or plain.
        second: likewise.
        on_layer: called with (matrices done, matrices in all) after each.

    Raises:
        FileNotFoundError: if one is not there.
        ValueError: if one has no safetensors, or is damaged.
    """
    both = open_weights(first), open_weights(second)
    names = [_names(weights) for weights in both]
    blocks = [_blocks(weights) for weights in both]
    shared = [
        name
        for name, key in names[0].items()
        if name in names[1] and both[0].shapes[key] == both[1].shapes[names[1][name]]
    ]
    matrices = [name for name in shared if len(both[0].shapes[names[0][name]]) > 1]
    changes = []
    for name in matrices:
        changes.append(_change(name, both, (names[0][name], names[1][name])))
        on_layer(len(changes), len(matrices))
    return CheckpointComparison(
        paths=(str(both[0].path), str(both[1].path)),
        matrices=tuple(sorted(changes, key=_how_much, reverse=True)),
        heads=_heads(*blocks),
        only_first=tuple(name for name in names[0] if name not in shared),
        only_second=tuple(name for name in names[1] if name not in shared),
    )


def _names(weights: WeightFiles) -> dict[str, str]:
    """Return the name on disk of each tensor of the plain model, by that in the model if known."""
    own = [key for key in weights.shapes if not weights.belongs_to_raw_layer(key)]
    try:
        in_model = outline(weights).in_model
    except UnsupportedModelError:
        in_model = {}
    return {in_model.get(key, key): key for key in own}


def _blocks(weights: WeightFiles) -> tuple[BlockSpectrum, ...]:
    try:
        return inspect_blocks(weights, outline(weights))
    except UnsupportedModelError:
        return ()


def _change(
    name: str, both: tuple[WeightFiles, WeightFiles], keys: tuple[str, str]
) -> MatrixChange:
    before, after = (
        as_matrix(weights.read_effective(key)).float()
        for weights, key in zip(both, keys, strict=True)
    )
    finite = [bool(torch.isfinite(matrix).all()) for matrix in (before, after)]
    sigmas = [
        leading_triple(matrix, tolerance=SIGMA_TOLERANCE).sigma.item() if good else None
        for matrix, good in zip((before, after), finite, strict=True)
    ]
    distance = None
    if all(finite):
        size = before.norm().item()
        moved = (after - before).norm().item()
        distance = moved / size if size else float(moved > 0)
    return MatrixChange(name.removesuffix(".weight"), (sigmas[0], sigmas[1]), distance)


def _how_much(change: MatrixChange) -> float:
    return float("inf") if change.distance is None else change.distance


def _heads(
    first: tuple[BlockSpectrum, ...], second: tuple[BlockSpectrum, ...]
) -> tuple[HeadChange, ...]:
    others = {block.name: block for block in second}
    changes = [
        HeadChange(
            block.name,
            head,
            (block.sigma_qk[head], others[block.name].sigma_qk[head]),
            (block.sec[head], others[block.name].sec[head]),
        )
        for block in first
        if block.name in others and len(block.sigma_qk) == len(others[block.name].sigma_qk)
        for head in range(len(block.sigma_qk))
    ]

    def growth(change: HeadChange) -> float:
        before, after = change.sigma_qk
        return after / before if before else 0.0

    return tuple(sorted(changes, key=growth, reverse=True))

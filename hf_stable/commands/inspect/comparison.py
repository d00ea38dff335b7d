"""How two checkpoints of the same model differ: by matrix, by vector and by head."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_stable._json import as_json_value
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.checkpoints.weight_files import WeightFiles, open_weights
from hf_stable.commands.inspect.blocks import BlockSpectrum, ModelOutline, inspect_blocks, outline
from hf_stable.commands.inspect.matrices import is_finite, largest_sigma
from hf_stable.measures.matrices import as_matrix

__all__ = [
    "CheckpointComparison",
    "HeadChange",
    "MatrixChange",
    "ShapeChange",
    "VectorChange",
    "compare_checkpoints",
]


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
class VectorChange:
    """One tensor of fewer than two dimensions in both checkpoints, such as a bias or a gain.

    Attributes:
        name: of the tensor.
        norm: its l2 norm before and after; None where it has NaN or infinite entries.
        distance: l2 norm of the difference over that of the first; None likewise.
    """

    name: str
    norm: tuple[float | None, float | None]
    distance: float | None


@dataclass(frozen=True)
class ShapeChange:
    """One tensor that has another shape in the second checkpoint: both, as they are on disk."""

    name: str
    shape: tuple[tuple[int, ...], tuple[int, ...]]


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
        vectors: likewise, tensors of fewer than two dimensions: biases and gains.
        heads: those in both, the most grown first; empty if the architecture is not known.
        reshaped: tensors in both with different shapes, in the order of the first.
        only_first: names of the tensors that only the first has.
        only_second: likewise of the second.
    """

    paths: tuple[str, str]
    matrices: tuple[MatrixChange, ...]
    vectors: tuple[VectorChange, ...]
    heads: tuple[HeadChange, ...]
    reshaped: tuple[ShapeChange, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Return whether both hold the same tensors, every entry finite and equal."""
        changes: tuple[MatrixChange | VectorChange, ...] = (*self.matrices, *self.vectors)
        same = all(change.distance == 0 for change in changes)
        return same and not (self.reshaped or self.only_first or self.only_second)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN and infinity become None."""
        return as_json_value(asdict(self) | {"is_same": self.is_same})


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
        on_layer: called with (tensors done, tensors in all) after each.

    Raises:
        FileNotFoundError: if one is not there.
        ValueError: if one has no safetensors, or is damaged.
    """
    both = open_weights(first), open_weights(second)
    models = _outline(both[0]), _outline(both[1])
    # Names on disk are not always those in the model, and a checkpoint may lack a config.json of
    # its own: the other's tells its names too.
    names = _names(both[0], models[0] or models[1]), _names(both[1], models[1] or models[0])
    blocks = [_blocks(weights, model) for weights, model in zip(both, models, strict=True)]
    shapes = {
        name: (both[0].shapes[key], both[1].shapes[names[1][name]])
        for name, key in names[0].items()
        if name in names[1]
    }
    shared = [name for name, (before, after) in shapes.items() if before == after]
    matrices: list[MatrixChange] = []
    vectors: list[VectorChange] = []
    for count, name in enumerate(shared, start=1):
        before, after = (w.read_effective(n[name]) for w, n in zip(both, names, strict=True))
        if before.ndim > 1:
            matrices.append(_matrix_change(name, as_matrix(before), as_matrix(after)))
        else:
            vectors.append(_vector_change(name, before, after))
        on_layer(count, len(shared))
    return CheckpointComparison(
        paths=(str(both[0].path), str(both[1].path)),
        matrices=tuple(sorted(matrices, key=_how_much, reverse=True)),
        vectors=tuple(sorted(vectors, key=_how_much, reverse=True)),
        heads=_heads(*blocks),
        reshaped=tuple(
            ShapeChange(name, pair) for name, pair in shapes.items() if pair[0] != pair[1]
        ),
        only_first=tuple(name for name in names[0] if name not in shapes),
        only_second=tuple(name for name in names[1] if name not in shapes),
    )


def _outline(weights: WeightFiles) -> ModelOutline | None:
    try:
        return outline(weights)
    except UnsupportedModelError:
        return None


def _names(weights: WeightFiles, model: ModelOutline | None) -> dict[str, str]:
    """Return the name on disk of each tensor of the plain model, by that in the model if known."""
    own = [key for key in weights.shapes if not weights.belongs_to_raw_layer(key)]
    in_model = {} if model is None else model.in_model
    return {in_model.get(key, key): key for key in own}


def _blocks(weights: WeightFiles, model: ModelOutline | None) -> tuple[BlockSpectrum, ...]:
    try:
        return () if model is None else inspect_blocks(weights, model)
    except UnsupportedModelError:
        return ()


def _matrix_change(name: str, before: Tensor, after: Tensor) -> MatrixChange:
    sigmas = [
        largest_sigma(matrix.float()) if is_finite(matrix) else None for matrix in (before, after)
    ]
    layer = name.removesuffix(".weight")
    return MatrixChange(layer, (sigmas[0], sigmas[1]), _distance(before, after))


def _vector_change(name: str, before: Tensor, after: Tensor) -> VectorChange:
    norms = [_norm(vector) if is_finite(vector) else None for vector in (before, after)]
    return VectorChange(name, (norms[0], norms[1]), _distance(before, after))


def _distance(before: Tensor, after: Tensor) -> float | None:
    """Return the norm of the difference over that of the first; None if either is not finite."""
    if not (is_finite(before) and is_finite(after)):
        return None
    exact = torch.promote_types(before.dtype, after.dtype)
    exact = torch.promote_types(exact, torch.float32) if exact.is_floating_point else torch.float64
    before, after = before.to(exact), after.to(exact)
    size, moved = _norm(before), _norm(after - before)
    return moved / size if size else float(moved > 0)


def _norm(tensor: Tensor) -> float:
    """Return the l2 norm over all entries, without overflow or underflow of their squares."""
    largest = tensor.abs().max().item() if tensor.numel() else 0
    return largest and largest * (tensor / largest).float().norm().item()


def _how_much(change: MatrixChange | VectorChange) -> float:
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

"""Which weight of a checkpoint each layer of the sidecar beside it folds to."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_stable.checkpoints.saved_state import WAY_OUT
from hf_stable.checkpoints.weight_files import WeightFiles
from hf_stable.measures.matrices import shapes_of

__all__ = ["Partner", "pair_layers"]


@dataclass(frozen=True)
class Partner:
    """What a weight on disk is folded from.

    Attributes:
        layer: the layer of the sidecar.
        part: which of its matrices, where each expert is a weight of its own on disk; None for all.
    """

    layer: str
    part: int | None = None


def pair_layers(weights: WeightFiles, sidecar: WeightFiles) -> tuple[dict[str, Partner], list[str]]:
    """Find, for each layer of a sidecar, the weight that it folds to.

    The sidecar has the names of the model in memory and the weights those on disk, which differ
    for ViT and Swin. So layers are told by their content: the first row of the folded weight,
    bit for bit; the name decides where several have the same.

    Returns:
        The partner in the sidecar of each weight, by its name, and the layers that fit no weight.

    Raises:
        ValueError: if a layer of the sidecar is not whole, naming the file.
    """
    for layer in sidecar.raw_layers:
        if problem := _problem_with(sidecar, layer):
            path = sidecar.file_of[f"{layer}.sigma_u"]
            raise ValueError(f"{path} is damaged ({layer!r} has {problem}). {WAY_OUT}")
    by_content: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    shapes = {shape for layer in sidecar.raw_layers for shape in _shapes_on_disk(sidecar, layer)}
    for name, shape in weights.shapes.items():
        if shape in shapes:
            by_content[_content(shape, weights.read_first_row(name))].append(name)
    partners: dict[str, Partner] = {}
    unmatched = []
    for layer in sidecar.raw_layers:
        own = {Partner(layer): _whole_content(sidecar, layer)}
        if sidecar.parts(layer).stacked and not by_content[own[Partner(layer)]]:
            own = _contents_of_parts(sidecar, layer)
        for partner, content in own.items():
            candidates = by_content[content]
            if not candidates:
                unmatched.append(layer)
                break
            name = f"{layer}.weight"
            chosen = name if name in candidates else candidates[0]
            candidates.remove(chosen)
            partners[chosen] = partner
    return partners, unmatched


def _shapes_on_disk(sidecar: WeightFiles, layer: str) -> list[tuple[int, ...]]:
    """Return the shapes that a folded layer may have on disk: its own, or those of experts."""
    shape, parts = sidecar.shapes[f"{layer}.weight"], sidecar.parts(layer)
    return [shape, *(parts.shapes(shape) if parts.stacked else ())]


def _whole_content(sidecar: WeightFiles, layer: str) -> tuple[Any, ...]:
    name, shape = f"{layer}.weight", sidecar.shapes[f"{layer}.weight"]
    scale = sidecar.read(f"{layer}.gamma") / sidecar.read(f"{layer}.sigma")
    spread = sidecar.parts(layer).spread(scale, shape)
    first = sidecar.read_first_row(name)
    row = (first.to(scale.dtype) * (spread[:1] if spread.ndim else spread)).to(first.dtype)
    return _content(shape, row)


def _contents_of_parts(sidecar: WeightFiles, layer: str) -> dict[Partner, tuple[Any, ...]]:
    folded = sidecar.parts(layer).matrices(sidecar.read_effective(f"{layer}.weight"))
    return {
        Partner(layer, index): _content(tuple(matrix.shape), matrix[:1])
        for index, matrix in enumerate(folded)
    }


def _problem_with(sidecar: WeightFiles, layer: str) -> str | None:
    """Say in what the tensors of a layer do not fit together, as far as pairing reads them."""
    shapes = {part: sidecar.shapes.get(f"{layer}.{part}") for part in ("weight", "gamma", "sigma")}
    if lacking := [part for part, shape in shapes.items() if shape is None]:
        return f"no {lacking[0]}"
    weight = sidecar.shapes[f"{layer}.weight"]
    try:
        count = (len(shapes_of(weight, sidecar.parts(layer))),)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        return f"parts that do not fit its weight: {error}"
    if not shapes["gamma"] == shapes["sigma"] == count or not all(weight):
        return f"shapes that do not fit together: {shapes}"
    return None


def _content(shape: tuple[int, ...], row: Tensor) -> tuple[Any, ...]:
    return shape, row.dtype, row.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

"""Which weight of a checkpoint each layer of the sidecar beside it folds to."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from hf_stable.checkpoints.saved_state import WAY_OUT
from hf_stable.checkpoints.weight_files import WeightFiles
from hf_stable.measures.matrices import shapes_of

__all__ = ["pair_layers"]


def pair_layers(weights: WeightFiles, sidecar: WeightFiles) -> tuple[dict[str, str], list[str]]:
    """Find, for each layer of a sidecar, the weight that it folds to.

    The sidecar has the names of the model in memory and the weights those on disk, which differ
    for ViT and Swin. So layers are told by their content: the first row of the folded weight,
    bit for bit; the name decides where several have the same.

    Returns:
        The layer of the sidecar for each weight's name, and the layers that fit no weight.

    Raises:
        ValueError: if a layer of the sidecar is not whole, naming the file.
    """
    for layer in sidecar.raw_layers:
        if problem := _problem_with(sidecar, layer):
            path = sidecar.file_of[f"{layer}.sigma_u"]
            raise ValueError(f"{path} is damaged ({layer!r} has {problem}). {WAY_OUT}")
    by_content: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    shapes = {sidecar.shapes[f"{layer}.weight"] for layer in sidecar.raw_layers}
    for name, shape in weights.shapes.items():
        if shape in shapes:
            by_content[_content(shape, weights.read_first_row(name))].append(name)
    partners: dict[str, str] = {}
    unmatched = []
    for layer in sidecar.raw_layers:
        name, shape = f"{layer}.weight", sidecar.shapes[f"{layer}.weight"]
        scale = sidecar.read(f"{layer}.gamma") / sidecar.read(f"{layer}.sigma")
        spread = sidecar.parts(layer).spread(scale, shape)
        first = sidecar.read_first_row(name)
        row = (first.to(scale.dtype) * (spread[:1] if spread.ndim else spread)).to(first.dtype)
        candidates = by_content[_content(shape, row)]
        if not candidates:
            unmatched.append(layer)
            continue
        chosen = name if name in candidates else candidates[0]
        candidates.remove(chosen)
        partners[chosen] = layer
    return partners, unmatched


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

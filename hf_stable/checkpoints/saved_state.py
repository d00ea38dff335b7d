"""What folding loses of a patched model, as data: raw tensors, configs, and what they fold to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_stable.measures.matrices import shapes_of
from hf_stable.measures.parts import Parts
from hf_stable.methods.config import MethodConfig
from hf_stable.methods.sigma_reparam.part_arithmetic import scale_parts
from hf_stable.methods.sigma_reparam.stored_parts import PARTS_TENSOR, parts_of_stored
from hf_stable.methods.sigma_reparam.triples import SIGMA_TENSORS

__all__ = ["WAY_OUT", "Configs", "SavedState", "check_layers"]

WAY_OUT = (
    "Continue from another checkpoint, or start anew from the folded weights in the folder with "
    "from_pretrained and hf_stable.patch"
)

LAYER_TENSORS = ("weight", *SIGMA_TENSORS)

LARGEST = 1e18
"""Entries up to which sigma has a place in float32 after each step."""

Configs = dict[str, tuple[MethodConfig, ...]]
"""The configs in force by the name of the part that was patched, "" for the model itself."""


@dataclass(frozen=True)
class SavedState:
    """What a sidecar holds.

    Attributes:
        path: its file.
        parts: what each part of the model was patched with.
        tensors: `<layer>.weight` (raw), `.gamma`, `.sigma`, `.sigma_u` and `.sigma_v` of each
            layer, named as in the model in memory.
        hf_stable_version: the version that wrote it.
        provenance: what the model started from and how it was trained, as plain data.
    """

    path: str
    parts: Configs
    tensors: dict[str, Tensor]
    hf_stable_version: str
    provenance: dict[str, Any]

    @property
    def configs(self) -> tuple[MethodConfig, ...]:
        """Return the configs of the model, or of its first part that was patched."""
        return next(iter(self.parts.values()), ())

    @property
    def layers(self) -> list[str]:
        """Return the names of the patched layers."""
        return [key.removesuffix(".gamma") for key in self.tensors if key.endswith(".gamma")]

    def layer(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one layer by their own names."""
        keys = {part: f"{name}.{part}" for part in (*LAYER_TENSORS, PARTS_TENSOR)}
        return {part: self.tensors[key] for part, key in keys.items() if key in self.tensors}

    def parts_of(self, name: str) -> Parts:
        """Return where the parts of a layer's weight lie."""
        return _parts_of(self.layer(name))

    def folds_to(self, weight: Tensor, name: str) -> bool:
        """Say whether a layer folds to this plain weight, bit for bit."""
        folded, given = self._folded(name), weight.detach().cpu()
        return given.shape == folded.shape and torch.allclose(
            given, folded.to(given.dtype), rtol=0, atol=0, equal_nan=True
        )

    def check_folds_to(self, weight: Tensor, name: str) -> None:
        """Raise ValueError unless a layer folds to this plain weight, bit for bit.

        It is how a sidecar of another save than the weights beside it is told apart.
        """
        shape = self.tensors[f"{name}.weight"].shape
        if weight.shape != shape:
            raise ValueError(
                f"{self.path} holds {name!r} with shape {tuple(shape)}, but the weights loaded "
                f"have {tuple(weight.shape)}: num_labels, or another size in the config, is not "
                f"what it was at the save. {WAY_OUT}"
            )
        if not self.folds_to(weight, name):
            raise ValueError(
                f"{self.path} belongs to another save than the weights beside it: its {name!r} "
                f"does not fold to theirs. {WAY_OUT}"
            )

    def _folded(self, name: str) -> Tensor:
        own = self.layer(name)
        return scale_parts(own["weight"], own["gamma"] / own["sigma"], _parts_of(own))


def _parts_of(layer: Mapping[str, Tensor]) -> Parts:
    stored = layer.get(PARTS_TENSOR)
    return parts_of_stored(layer["weight"].shape, layer["sigma_u"].shape, stored)


def check_layers(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless tensors are those of whole layers whose shapes fit together."""
    layers: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if part not in (*LAYER_TENSORS, PARTS_TENSOR) or not name:
            raise ValueError(f"{key!r} is no tensor of a patched layer")
        layers[name][part] = tensor
    for name, parts in layers.items():
        if lacking := [part for part in LAYER_TENSORS if part not in parts]:
            raise ValueError(f"{name!r} has no {lacking[0]}")
        if problem := _problem_with(parts):
            raise ValueError(f"{name!r} has {problem}")


def _problem_with(parts: Mapping[str, Tensor]) -> str | None:
    for part, tensor in parts.items():
        if tensor.is_floating_point() == (part == PARTS_TENSOR):
            return f"a {part} of {tensor.dtype}"
    weight, gamma, sigma, u, v = (parts[part] for part in LAYER_TENSORS)
    shapes = f"weight {tuple(weight.shape)}, " + ", ".join(
        f"{part} {tuple(parts[part].shape)}" for part in SIGMA_TENSORS
    )
    if weight.ndim < 2 or gamma.ndim != 1 or u.ndim != 2 or v.ndim != 2:
        return f"shapes that do not fit together: {shapes}"
    try:
        heights, widths = zip(*shapes_of(weight.shape, _parts_of(parts)), strict=True)
    except ValueError:
        return f"shapes that do not fit together: {shapes}"
    count = (len(heights),)
    vectors = (*count, max(heights)), (*count, max(widths))
    if not (gamma.shape == sigma.shape == count and (u.shape, v.shape) == vectors):
        return f"shapes that do not fit together: {shapes}"
    # A run that was lost may have been saved so, with a weight that is no better.
    is_lost = not all(each.isfinite().all() for each in (sigma, u, v))
    if is_lost and (weight.abs() <= LARGEST).all():
        return "a sigma or vectors that are not finite, beside a weight that is"
    return None

"""Which kernels step and refresh which weights, and what torch does in their place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_stable.kernels import cpu, gpu, reference
from hf_stable.kernels.weights import RuledWeight, TrackedWeight

__all__ = [
    "CHOICES",
    "SWITCH",
    "Workspaces",
    "chosen",
    "describe_paths",
    "refresh_layers",
    "step_by_kernels",
]

SWITCH = "HF_STABLE_KERNELS"
"""The environment variable that chooses."""

CHOICES = {
    "": "compiled by numba on a CPU, torch elsewhere",
    "triton": "compiled by numba on a CPU, Triton on a GPU",
    "torch": "torch everywhere",
}
"""What it may say, and what that means. Triton has not run on a GPU yet: it has to be asked for."""


class Workspaces(dict[tuple[torch.dtype, torch.device], Any]):
    """What the kernels keep from step to step, by dtype and device. It is no state.

    Attributes:
        taken: what each weight was like when it was last stepped, by the id of its parameter.
    """

    def __init__(self) -> None:
        """Know no weight."""
        super().__init__()
        self.taken: dict[int, _Taken] = {}


class _Taken:
    """A weight that a kernel has taken: all that it looked at, as it was then."""

    __slots__ = ("addresses", "held", "ids", "key", "parts", "path")

    def __init__(self, weight: RuledWeight, path: ModuleType) -> None:
        self.path = path
        self.key = weight.param.dtype, weight.param.device
        self.held = self._tensors(weight)  # which are kept, so that no other one gets their ids
        self.ids = [*map(id, self.held)]
        self.addresses = [tensor.data_ptr() for tensor in self.held]
        self.parts = weight.parts

    def is_like(self, weight: RuledWeight) -> bool:
        """Say whether parameter and state are the same tensors, in the same places."""
        held = self._tensors(weight)
        return (
            [*map(id, held)] == self.ids
            and [tensor.data_ptr() for tensor in held] == self.addresses
            and weight.parts is self.parts
        )

    def _tensors(self, weight: RuledWeight) -> list[Any]:
        return [weight.param, *map(weight.state.get, self.path.STATE)]


Ruled = TypeVar("Ruled", bound=RuledWeight)


def chosen() -> str:
    """Return what the environment variable says.

    Raises:
        ValueError: if it says anything else than `CHOICES`.
    """
    choice = os.environ.get(SWITCH, "")
    if choice not in CHOICES:
        allowed = ", ".join(repr(each) for each in CHOICES if each)
        raise ValueError(f"{SWITCH}={choice!r} is not allowed; leave it unset, or give {allowed}")
    return choice


def _paths() -> list[ModuleType]:
    """Return the kernels that may be used, here and now."""
    choice = chosen()
    if choice == "torch" or torch.compiler.is_compiling():
        return []
    paths: list[ModuleType] = [cpu] if cpu.is_available() else []
    return [*paths, gpu] if choice == "triton" and gpu.is_available() else paths


def step_by_kernels(weights: Sequence[Ruled], workspaces: Workspaces) -> list[Ruled]:
    """Step under Rule 1 what a kernel takes, in place, and return the other weights untouched.

    Beside a kernel, the reference steps weights whose layout or dtype it does not know. What is
    left is new to the rule, or sharded, or on a device without kernels.

    Args:
        weights: with their state prepared.
        workspaces: of the optimizer, to be handed in again.
    """
    paths, left = _paths(), []
    taken: dict[tuple[torch.dtype, torch.device], tuple[ModuleType, list[Ruled]]] = {}
    before, workspaces.taken = workspaces.taken, {}
    for weight in weights:
        seen = before.get(id(weight.param))
        if seen is None or seen.path not in paths or not _still_takes(seen, weight):
            path = next((path for path in paths if path.takes(weight)), None)
            seen = None if path is None else _Taken(weight, path)
        if seen is not None:
            workspaces.taken[id(weight.param)] = seen
            taken.setdefault(seen.key, (seen.path, []))[1].append(weight)
            continue
        device = weight.param.device.type
        if any(device == path.DEVICE for path in paths) and reference.takes(weight):
            reference.step_weight(weight)
        else:
            left.append(weight)
    for key in [key for key in workspaces if key not in taken]:
        del workspaces[key]
    for key, (path, own) in taken.items():
        workspaces[key] = path.step_weights(own, workspaces.get(key))
    return left


def _still_takes(seen: _Taken, weight: RuledWeight) -> bool:
    """Say whether a kernel takes a weight once more, for the price of a look at what is new."""
    return seen.is_like(weight) and seen.path.takes_gradient(weight)


def refresh_layers(layers: Sequence[TrackedWeight], keep: Tensor | None) -> None:
    """Move the triples of layers, by a kernel where one takes the weight, else by the reference.

    Args:
        layers: whose triples are to be moved; the same and in the same order on every rank of a
            sharded weight.
        keep: where this tensor of one element is not zero, everything stays as it is.
    """
    paths = _paths()
    taken: dict[tuple[Any, ...], tuple[ModuleType, list[TrackedWeight]]] = {}
    for layer in layers:
        path = next((path for path in paths if path.tracks(layer, keep)), reference)
        key: tuple[Any, ...] = ()
        if path is not reference:
            key = layer.weight.dtype, layer.weight.device, layer.power_iterations
        taken.setdefault(key, (path, []))[1].append(layer)
    for path, own in taken.values():
        path.refresh_layers(own, keep)


def describe_paths() -> dict[str, str]:
    """Say for each kind of device what steps and refreshes weights there, for `doctor`."""
    choice = chosen()
    on_cpu = "numba" if cpu.is_available() and choice != "torch" else "torch"
    why = (
        "" if on_cpu == "numba" or choice == "torch" else " (pip install hf-stable[fast] is faster)"
    )
    uses_triton = choice == "triton" and gpu.is_available()
    on_gpu = "triton" if uses_triton else f"torch ({SWITCH}=triton chooses Triton)"
    return {"weights on a CPU": on_cpu + why, "weights on a GPU": on_gpu}

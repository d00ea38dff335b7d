"""What a checkpoint's matrices and heads look like, streamed from safetensors without its model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_stable._file_names import SIDECAR_FILE
from hf_stable._json import as_json_value
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.checkpoints.pairing import pair_layers
from hf_stable.checkpoints.weight_files import WeightFiles, open_sidecar, open_weights
from hf_stable.commands.inspect.blocks import (
    BlockSpectrum,
    NormGain,
    inspect_blocks,
    inspect_norms,
    outline,
)
from hf_stable.commands.inspect.findings import find_signs
from hf_stable.commands.inspect.matrices import LayerSpectrum, inspect_matrix, is_finite, is_matrix

__all__ = ["CheckpointReport", "inspect_checkpoint"]


@dataclass(frozen=True)
class CheckpointReport:
    """What `inspect_checkpoint` found.

    Attributes:
        path: the folder or file.
        kind: `"plain"`; `"folded"` for plain weights beside a sidecar; `"raw"` for the state dict
            of a patched model, whose weights are not what the model computes with.
        layers: its matrices, in the order of the files.
        num_parameters: entries of all tensors of the plain model.
        nonfinite: names of all tensors with NaN or infinite entries: matrices, gains, biases, and
            what a patched layer has beside its weight.
        problem: what makes sidecar and weights not fit together, or None.
        blocks: spectra of Wq^T Wk of each head.
        norms: gains of the norms.
        blocks_note: why there are no blocks and norms, or None.
    """

    path: str
    kind: str
    layers: tuple[LayerSpectrum, ...]
    num_parameters: int
    nonfinite: tuple[str, ...] = ()
    problem: str | None = None
    blocks: tuple[BlockSpectrum, ...] = ()
    norms: tuple[NormGain, ...] = ()
    blocks_note: str | None = None

    @property
    def is_healthy(self) -> bool:
        """Return whether every entry is finite, and weights and sidecar are of the same save."""
        return self.problem is None and not self.nonfinite

    @property
    def signs(self) -> tuple[str, ...]:
        """Return what stands out, in sentences; see `find_signs`."""
        return find_signs(self.layers, self.blocks, self.nonfinite)

    @property
    def verdict(self) -> str:
        """Return the judgement in one sentence."""
        if not self.is_healthy:
            return "Not healthy: a problem is named below"
        if self.signs:
            return f"Usable, but {len(self.signs)} sign(s) of trouble stand out"
        heads = "" if self.blocks else "; heads were not looked at"
        return f"Healthy: every entry is finite and nothing stands out{heads}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN and infinity become None."""
        judged = {"is_healthy": self.is_healthy, "verdict": self.verdict, "signs": self.signs}
        return as_json_value(asdict(self) | judged)


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> CheckpointReport:
    """Compute sigma of every matrix of a checkpoint, one tensor in memory at a time.

    Where a config.json of a registered architecture lies beside the weights, the spectra of Wq^T Wk
    of every head and the gains of the norms too, two tensors in memory at a time. Every
    floating-point tensor is searched for NaN and infinite entries, matrix or not; of a sidecar what
    lies beside the raw weights, whose folded form is searched already.

    Matrices are the floating-point tensors that are 2-D, or kernels (more dimensions, named
    "*.weight"), which are flattened as `as_matrix` does. gamma and the raw sigma come from the
    sidecar, or from the file itself if it is the raw state dict of a patched model.

    Args:
        path: a folder, sharded or not, or one safetensors file; see `open_weights`.
        on_layer: called with (matrices done, matrices in all) after each.

    Raises:
        FileNotFoundError: if there is nothing there, or a shard is missing.
        ValueError: if there are no safetensors, or a file is damaged.
    """
    weights = open_weights(path)
    folder = weights.path if weights.path.is_dir() else weights.path.parent
    sidecar = (
        None if weights.path.name.startswith(Path(SIDECAR_FILE).stem) else open_sidecar(folder)
    )
    partners, unmatched = pair_layers(weights, sidecar) if sidecar else ({}, [])
    raw = set(weights.raw_layers)
    own = {n: shape for n, shape in weights.shapes.items() if not weights.belongs_to_raw_layer(n)}
    names = {name for name, shape in own.items() if is_matrix(name, shape)}
    nonfinite = [] if sidecar is None else _nonfinite_beside_weights(sidecar)
    layers: list[LayerSpectrum] = []
    for name, tensor in weights:
        if name not in names:
            if not is_finite(tensor):
                nonfinite.append(name)
            continue
        layer = name.removesuffix(".weight")
        if name in partners:
            assert sidecar is not None
            layers.append(inspect_matrix(layer, tensor, sidecar, partners[name]))
        else:
            layers.append(inspect_matrix(layer, tensor, weights, layer if layer in raw else None))
        if not layers[-1].finite:
            nonfinite.append(name)
        on_layer(len(layers), len(names))
    problem = None
    if unmatched and weights.path.is_dir():
        problem = (
            f"{SIDECAR_FILE} belongs to another save than the weights beside it: {len(unmatched)} "
            f"of its layers fold to none of them (first: {unmatched[0]!r})"
        )
    blocks, norms, note = _blocks_and_norms(weights)
    return CheckpointReport(
        path=str(weights.path),
        kind="raw" if raw else "folded" if sidecar else "plain",
        layers=tuple(layers),
        num_parameters=sum(torch.Size(shape).numel() for shape in own.values()),
        nonfinite=tuple(nonfinite),
        problem=problem,
        blocks=blocks,
        norms=norms,
        blocks_note=note,
    )


def _nonfinite_beside_weights(sidecar: WeightFiles) -> list[str]:
    names = filter(sidecar.belongs_to_raw_layer, sidecar.shapes)
    return [name for name in names if not is_finite(sidecar.read(name))]


def _blocks_and_norms(
    weights: WeightFiles,
) -> tuple[tuple[BlockSpectrum, ...], tuple[NormGain, ...], str | None]:
    try:
        model = outline(weights)
        return inspect_blocks(weights, model), inspect_norms(weights, model), None
    except UnsupportedModelError as error:
        return (), (), str(error)

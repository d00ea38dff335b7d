"""What a checkpoint's matrices and heads look like, streamed from safetensors without its model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_stable._file_names import SIDECAR_FILE
from hf_stable._json import as_json_value
from hf_stable.architectures.registry import UnsupportedModelError
from hf_stable.checkpoints.pairing import Partner, pair_layers
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
    sidecar = _sidecar_beside(weights)
    partners, unmatched = pair_layers(weights, sidecar) if sidecar else ({}, [])
    layers, nonfinite = _inspect_tensors(weights, sidecar or weights, partners, on_layer)
    if sidecar is not None:
        nonfinite = [*_nonfinite_beside_weights(sidecar), *nonfinite]
    problem = None
    if unmatched and weights.path.is_dir():
        problem = (
            f"{SIDECAR_FILE} belongs to another save than the weights beside it: {len(unmatched)} "
            f"of its layers fold to none of them (first: {unmatched[0]!r})"
        )
    blocks, norms, note = _blocks_and_norms(weights)
    return CheckpointReport(
        path=str(weights.path),
        kind="raw" if weights.raw_layers else "folded" if sidecar else "plain",
        layers=tuple(layers),
        num_parameters=sum(map(math.prod, _plain_tensors(weights).values())),
        nonfinite=tuple(nonfinite),
        problem=problem,
        blocks=blocks,
        norms=norms,
        blocks_note=note,
    )


def _sidecar_beside(weights: WeightFiles) -> WeightFiles | None:
    """Open the sidecar beside weights; the sidecar itself has none."""
    if weights.path.name.startswith(Path(SIDECAR_FILE).stem):
        return None
    return open_sidecar(weights.path if weights.path.is_dir() else weights.path.parent)


def _plain_tensors(weights: WeightFiles) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the plain model has too, by name."""
    return {n: shape for n, shape in weights.shapes.items() if not weights.belongs_to_raw_layer(n)}


def _inspect_tensors(
    weights: WeightFiles,
    state: WeightFiles,
    partners: Mapping[str, Partner],
    on_layer: Callable[[int, int], None],
) -> tuple[list[LayerSpectrum], list[str]]:
    """Measure every matrix, and name the tensors with entries that are not finite.

    Args:
        weights: the tensors.
        state: where gamma and the raw sigma of patched layers are.
        partners: the patched layer there of each weight that is one, by the weight's name.
        on_layer: as in `inspect_checkpoint`.
    """
    if raw := weights.raw_layers:
        state, partners = weights, {f"{layer}.weight": Partner(layer) for layer in raw}
    matrices = {n for n, shape in _plain_tensors(weights).items() if is_matrix(n, shape)}
    layers: list[LayerSpectrum] = []
    nonfinite = []
    for name, tensor in weights:
        if name in matrices:
            layer = name.removesuffix(".weight")
            layers.append(inspect_matrix(layer, tensor, state, partners.get(name)))
            on_layer(len(layers), len(matrices))
            finite = layers[-1].finite
        else:
            finite = is_finite(tensor)
        if not finite:
            nonfinite.append(name)
    return layers, nonfinite


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

"""What one matrix of a checkpoint looks like: its largest singular value and stable rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_stable.checkpoints.pairing import Partner
from hf_stable.checkpoints.weight_files import WeightFiles
from hf_stable.measures.leading import leading_triple
from hf_stable.measures.matrices import local_matrices
from hf_stable.measures.parts import WHOLE

__all__ = ["LayerSpectrum", "inspect_matrix", "is_finite", "is_matrix", "largest_sigma"]

SIGMA_TOLERANCE = 1e-4
"""Residual at which a singular vector is good enough: sigma's own error is of its square."""


@dataclass(frozen=True)
class LayerSpectrum:
    """One matrix of a checkpoint.

    Attributes:
        name: name of the layer on disk, without ".weight".
        shape: shape of the tensor, as stored.
        dtype: its type, such as "bfloat16".
        sigma: largest singular value of the tensor as it is stored, of each part of a fused one
            whose parts have a gamma of their own; empty if `note` says why.
        stable_rank: squared Frobenius norm over squared sigma, likewise; empty for a zero part.
        gamma: learnable scale of each part, where the layer is patched.
        raw_sigma: largest singular value of the raw weight in the sidecar.
        note: why there is no sigma, or None.
        finite: whether all entries are finite numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sigma: tuple[float, ...]
    stable_rank: tuple[float, ...] = ()
    gamma: tuple[float, ...] = ()
    raw_sigma: tuple[float, ...] = ()
    note: str | None = None
    finite: bool = True


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor counts as a matrix: it is 2-D, or a kernel ("*.weight" of more)."""
    return len(shape) == 2 or (len(shape) > 2 and name.endswith(".weight"))


def is_finite(tensor: Tensor) -> bool:
    """Say whether no entry is NaN or infinite; integers have no such entries."""
    if not tensor.is_floating_point():
        return True
    return all(bool(torch.isfinite(part).all()) for part in _parts(tensor))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's entries in parts, so that what is worked out of them takes little memory."""
    for part in tensor.reshape(-1).split(1 << 20):
        # torch knows no isfinite for most types of eight bits.
        yield part.float() if part.element_size() < 4 else part


def _norm(matrix: Tensor) -> float:
    return math.hypot(*(part.norm().item() for part in _parts(matrix)))


def largest_sigma(matrix: Tensor) -> float:
    """Return the largest singular value of a finite (rows, columns) matrix."""
    return leading_triple(matrix, tolerance=SIGMA_TOLERANCE).sigma.item()


def inspect_matrix(
    name: str, tensor: Tensor, state: WeightFiles, partner: Partner | None
) -> LayerSpectrum:
    """Measure one matrix.

    Args:
        name: of the layer on disk.
        tensor: of two dimensions or more; see `as_matrix`.
        state: the files that hold gamma and sigma of its patched layer.
        partner: its patched layer in `state`, or the part of one; None if it is none.

    Raises:
        ValueError: if a file is damaged.
    """
    gamma: tuple[float, ...] = ()
    raw_sigma: tuple[float, ...] = ()
    parts = WHOLE
    if partner is not None:
        gamma = tuple(state.read(f"{partner.layer}.gamma").tolist())
        raw_sigma = tuple(state.read(f"{partner.layer}.sigma").tolist())
        if partner.part is None:
            parts = state.parts(partner.layer) if len(gamma) > 1 else WHOLE
        else:
            gamma, raw_sigma = gamma[partner.part :][:1], raw_sigma[partner.part :][:1]
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    finite = is_finite(tensor)
    note = None
    if not tensor.is_floating_point():
        note = "not floating point: quantised, or no weight"
    elif tensor.numel() == 0:
        note = "empty"
    elif not finite:
        note = "has NaN or infinite entries"
    if note is not None:
        return LayerSpectrum(name, shape, dtype, (), (), gamma, raw_sigma, note, finite)
    matrices = local_matrices(tensor, parts)
    sigma = tuple(map(largest_sigma, matrices))
    ranks = tuple(
        (_norm(matrix) / value) ** 2 for matrix, value in zip(matrices, sigma, strict=True) if value
    )
    return LayerSpectrum(name, shape, dtype, sigma, ranks, gamma, raw_sigma)

"""What stands out in a checkpoint: rules on the figures of an inspection, in plain sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median

from hf_stable.block_inspection import BlockSpectrum
from hf_stable.matrix_inspection import LayerSpectrum

__all__ = ["find_signs"]

OUTLIER = 10.0
"""How many times the median of its like a singular value has to be to stand out."""

COLLAPSED_SEC = 0.99
"""Share of energy in four directions above which a head counts as concentrated."""

FEWEST = 4
"""With fewer of its like, nothing can stand out."""


def find_signs(
    layers: Sequence[LayerSpectrum],
    blocks: Sequence[BlockSpectrum],
    nonfinite: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return what to look at, in sentences; none where nothing stands out.

    These are signs and no proof: a checkpoint does not show whether its loss came down.

    Args:
        layers: the matrices.
        blocks: spectra of Wq^T Wk, if the architecture is known.
        nonfinite: names of tensors with NaN or infinite entries.
    """
    spoilt = (f"{name} has NaN or infinite entries" for name in nonfinite)
    return (*spoilt, *_about_matrices(layers), *_about_outliers(layers), *_about_heads(blocks))


def _about_matrices(layers: Sequence[LayerSpectrum]) -> Iterator[str]:
    for layer in layers:
        if layer.sigma and max(layer.sigma) == 0:
            yield f"{layer.name} is all zero"
        if any(gamma == 0 for gamma in layer.gamma):
            yield f"gamma of {layer.name} is zero: the layer is cut off"


def _about_outliers(layers: Sequence[LayerSpectrum]) -> Iterator[str]:
    """Compare matrices of the same role: those whose names differ in a number alone."""
    roles: defaultdict[str, list[LayerSpectrum]] = defaultdict(list)
    for layer in layers:
        if layer.sigma:
            role = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
            roles[role].append(layer)
    for alike in roles.values():
        if len(alike) < FEWEST:
            continue
        usual = median(max(layer.sigma) for layer in alike)
        for layer in alike:
            if max(layer.sigma) > OUTLIER * usual > 0:
                yield (
                    f"sigma1 of {layer.name} is {max(layer.sigma):.3g}, "
                    f"{max(layer.sigma) / usual:.0f} times the median of its like"
                )


def _about_heads(blocks: Sequence[BlockSpectrum]) -> Iterator[str]:
    sigmas = [sigma for block in blocks for sigma in block.sigma_qk]
    usual = median(sigmas) if len(sigmas) >= FEWEST else 0.0
    for block in blocks:
        for head, (sigma, sec) in enumerate(zip(block.sigma_qk, block.sec, strict=True)):
            if sec > COLLAPSED_SEC and sigma > OUTLIER * usual > 0:
                yield (
                    f"{block.name}, head {head} looks collapsed: sigma1(Wq^T Wk) is {sigma:.3g}, "
                    f"{sigma / usual:.0f} times the median head's, and {sec:.1%} of its energy "
                    "lies in four directions"
                )

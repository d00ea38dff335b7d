"""What stands out in a checkpoint: rules on the figures of an inspection, in plain sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import median

from hf_stable.commands.inspect.blocks import BlockSpectrum
from hf_stable.commands.inspect.matrices import LayerSpectrum
from hf_stable.monitor.terms import SEC_VALUES

__all__ = ["find_signs"]

OUTLIER = 10.0
"""How many times the median of its like a singular value has to be to stand out."""

COLLAPSED_SEC = 0.99
"""Share of energy in four directions above which a head counts as concentrated."""

STRONG_SIGMA = 2.0
"""sigma_1(Wq^T Wk) / sqrt(d_q) above which a concentrated head counts as collapsed by itself.

The logits are x_i^T Wq^T Wk x_j / sqrt(d_q). For tokens of independent entries of variance 1, as
norms hand them on, this is the standard deviation that the leading direction alone gives them: at
2, a key that lies one such deviation higher is attended to seven times as much (e^2). It is the C_0
of theorem 1 in Qi et al. 2025, above which few directions make attention sparse and of low rank.

Measured at the end of 339 runs of small models (ViT, Swin, GPT-2, BERT), for half of the heads of a
block: at most .18 in the 160 that trained well, .76 in the 52 that trained with something to look
at, 2.4 where the loss hardly moved; of the 72 that failed 8 pass 2, up to 7.1. So it misses most
failures, which leave other traces or none in the weights, and accuses no run that trained. Heads of
a trained all-MiniLM-L6-v2 reach 6 with an SEC of .62: a large sigma_1 alone is no sign.
"""

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
    """Find heads that stand out from the others, and blocks where too many are alike for that."""
    sigmas = [sigma for block in blocks for sigma in block.sigma_qk]
    usual = median(sigmas) if len(sigmas) >= FEWEST else 0.0
    for block in blocks:
        concentrated = _concentrated_heads(block)
        outliers = {h: s for h, s in concentrated.items() if s > OUTLIER * usual > 0}
        for head, sigma in outliers.items():
            yield (
                f"{block.name}, head {head} looks collapsed: sigma1(Wq^T Wk) is {sigma:.3g}, "
                f"{sigma / usual:.0f} times the median head's, and {block.sec[head]:.1%} of its "
                "energy lies in four directions"
            )
        unit = sqrt(block.head_size)
        strong = {h: s for h, s in concentrated.items() if s > STRONG_SIGMA * unit}
        if len(strong) >= len(block.sigma_qk) / 2 and strong.keys() - outliers.keys():
            weakest = min(strong.values())
            yield (
                f"{block.name}: {len(strong)} of {len(block.sigma_qk)} heads look collapsed: more "
                f"than {COLLAPSED_SEC:.0%} of their energy lies in four directions, and "
                f"sigma1(Wq^T Wk) is {weakest:.3g} or more, {weakest / unit:.3g} times sqrt(d_q)"
            )


def _concentrated_heads(block: BlockSpectrum) -> dict[int, float]:
    """Return sigma_1(Wq^T Wk) of the heads with most of their energy in four directions, by head.

    Of heads with no more than four directions it would be all: there are none then.
    """
    if block.head_size <= SEC_VALUES:
        return {}
    return {
        head: sigma
        for head, (sigma, sec) in enumerate(zip(block.sigma_qk, block.sec, strict=True))
        if sec > COLLAPSED_SEC
    }

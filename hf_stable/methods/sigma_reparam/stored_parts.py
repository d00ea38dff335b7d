"""How files say where the parts of a raw weight lie: by shapes, or by a tensor where these do not.

Equal parts, one behind the other, are told by the shapes of weight and vectors. Others (heads
interleaved, fewer key heads, experts) have a fifth tensor beside gamma, sigma, u and v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_stable.measures.parts import Parts

__all__ = ["PARTS_TENSOR", "as_tensor", "parts_of_stored", "plain_weight_name"]

PARTS_TENSOR = "sigma_parts"
"""Name of the tensor, where there is one."""


def as_tensor(parts: Parts) -> Tensor | None:
    """Return (dim, stacked, repeats, *shares) as a tensor, or None where shapes tell the parts."""
    if parts.repeats == 1 and not parts.stacked and len(set(parts.shares)) == 1:
        return None
    return torch.tensor([parts.dim, int(parts.stacked), parts.repeats, *parts.shares])


def parts_of_stored(weight: Sequence[int], u: Sequence[int], stored: Tensor | None = None) -> Parts:
    """Return where the parts of a raw weight lie.

    Args:
        weight: its shape.
        u: that of its left singular vectors, (k, m).
        stored: the tensor beside them, if there is one.
    """
    if stored is not None:
        dim, stacked, repeats, *shares = stored.tolist()
        return Parts(tuple(shares), repeats, dim, bool(stacked))
    num_parts, height = u
    # The vectors are as long as a part's first side: where that is the whole one, parts lie along
    # the other.
    dim = 1 if num_parts > 1 and height == weight[0] else 0
    return Parts((1,) * num_parts, 1, dim)


def plain_weight_name(layer: str, parts: Parts) -> str:
    """Return what the plain model calls the weight of a patched layer.

    Experts in one parameter have no layer there: the parameter has the name of the patched one.
    """
    return layer if parts.stacked else f"{layer}.weight"

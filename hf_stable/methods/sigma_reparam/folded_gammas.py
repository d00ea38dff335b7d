"""Gammas of layers that were folded: an optimizer that still has them is one of the patched model.

Its moments are those of the raw weights, and the folded ones have another scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from weakref import WeakValueDictionary

from torch import Tensor

__all__ = ["note_folded", "warn_of_folded"]

_folded: WeakValueDictionary[int, Tensor] = WeakValueDictionary()


def note_folded(gamma: Tensor) -> None:
    """Keep a gamma in mind, as long as somebody else holds it."""
    _folded[id(gamma)] = gamma


def warn_of_folded(owned: Iterable[int], live: Iterable[int]) -> bool:
    """Warn of an optimizer that has gammas of folded layers; say whether it has.

    Args:
        owned: ids of its parameters.
        live: ids of the gammas of all layers that are patched.
    """
    found = set(_folded).intersection(owned).difference(live)
    if found:
        warnings.warn(
            f"hf_stable.fold has turned {len(found)} layers into plain ones since this optimizer "
            "was built: it still holds their gamma, and its moments are those of the raw weights, "
            "which had another scale. Build a new optimizer to go on with the folded model, or "
            "fold once the training has ended; to save a plain model in between, "
            "save_pretrained folds what it writes and leaves the model patched",
            UserWarning,
            stacklevel=4,
        )
    return bool(found)

"""What a probe keeps, and what it can be asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_stable.monitor.terms import TERMS, names_of

__all__ = ["MAP_SIZE", "Records", "check_maps", "resolve_terms"]

MAP_SIZE = 64
"""Longer maps are subsampled to this many rows and bins of keys."""


def resolve_terms(terms: Any) -> frozenset[str]:
    """Return the names that "all", "default" or a list of names stands for.

    Raises:
        ValueError: for anything else, or a name that `terms=` does not choose.
    """
    known = names_of()
    if isinstance(terms, str) and terms in ("all", "default"):
        return frozenset(names_of(default=terms == "default"))
    if isinstance(terms, str) or not isinstance(terms, Iterable):
        raise ValueError(
            f'terms must be "all", "default" or a list of names, got {terms!r}; names are '
            f"{', '.join(known)}"
        )
    unknown = [term for term in terms if term not in known]
    if unknown:
        raise ValueError(f"unknown term {unknown[0]!r}; known are {', '.join(known)}")
    return frozenset(terms)


def check_maps(maps: Any, most_heads: int | None = None) -> None:
    """Raise ValueError unless maps are asked for by "all" or by indices of heads.

    Args:
        maps: what to check.
        most_heads: heads of the layer that has most of them, if known.
    """
    if isinstance(maps, str) and maps == "all":
        return
    is_list = isinstance(maps, Sequence) and not isinstance(maps, str)
    if not is_list or not all(type(head) is int and head >= 0 for head in maps):
        raise ValueError(f'maps is "all" or a list of heads, counted from 0, got {maps!r}')
    if most_heads is not None and any(head >= most_heads for head in maps):
        raise ValueError(
            f"maps={list(maps)}: the model has {most_heads} heads in a layer, 0 to {most_heads - 1}"
        )


class Records:
    """What one probe has recorded: each quantity is an attribute, a mapping from layer to value.

    The quantities and what they mean are those of `hf_stable.monitor.terms` that a probe records.
    Layers are blocks, by their qualified name, in the order of the model; attention that belongs to
    no known block, or is a block's second, goes by the name of its own module. Values are float32
    tensors on the model's device, means over what ran: (heads,) for what is of each head, () for
    what is of each layer. Besides:

    - `entropy_normalised` is NaN where no row sees two keys.
    - `mode` holds for each head "normal", "benign", "malignant" (Qi et al. 2025), or "undefined"
      for a map that is not finite.
    - `maps` are (chosen heads that the layer has, n, n), the attention of the first sequence, n <=
      `MAP_SIZE`: of a longer one n sampled rows, their keys summed in n equal bins.
    - `sec_curve` is (n,), SEC(d_q, s) at s = 1, 2, 4, ..., the powers of two up to d_q, of the head
      with the highest `sec`.
    - `entropy_bound` is far below the entropy as a rule.
    - Counts are summed over forwards. Blocks without a parameter have no value for its norm.

    Attributes:
        counts: quantity -> layer -> how many values its mean is of, (heads,) or ().
        missing: quantity -> layer -> why it could not be measured there.
    """

    def __init__(self) -> None:
        """Begin with nothing recorded."""
        self.counts: dict[str, dict[str, Tensor]] = {}
        self.missing: dict[str, dict[str, str]] = {}
        self._quantities: dict[str, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> dict[str, Any]:
        """Return the values of a quantity by layer, which are none before any was recorded."""
        if name in TERMS and TERMS[name].is_recorded:
            return self._quantities.setdefault(name, {})
        known = ", ".join(term.name for term in TERMS.values() if term.is_recorded)
        raise AttributeError(f"a probe records no {name!r}; its quantities are {known}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Replace the values of a quantity."""
        if name in TERMS:
            self._quantities[name] = value
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        """Name the quantities that have values, and of how many layers."""
        found = {name: len(by_layer) for name, by_layer in self._quantities.items() if by_layer}
        return f"Records({', '.join(f'{name} of {n} layers' for name, n in found.items())})"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain lists and numbers for JSON, without empty quantities; NaN, inf as None."""
        return {name: _plain(values) for name in TERMS if (values := self._quantities.get(name))}

    def reasons(self) -> dict[str, dict[str, str]]:
        """Return `missing`, and the layers with a value that is too large to be one."""
        found = {name: dict(by_layer) for name, by_layer in self.missing.items()}
        for name, by_layer in self._quantities.items():
            for layer, value in by_layer.items():
                if isinstance(value, Tensor) and value.isinf().any():
                    found.setdefault(name, {})[layer] = f"too large for {value.dtype}"
        return found

    def weights(self) -> dict[str, dict[str, Any]]:
        """Return `counts` as plain lists and numbers."""
        return {name: _plain(by_layer) for name, by_layer in self.counts.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str) or math.isfinite(value) else None

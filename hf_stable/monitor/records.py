"""What a probe keeps, and what it can be asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from hf_stable.monitor.block_terms import WEIGHT_TERMS

__all__ = [
    "ATTENTION_TERMS",
    "DEFAULT_TERMS",
    "MAP_SIZE",
    "TERMS",
    "Records",
    "check_maps",
    "resolve_terms",
]

ATTENTION_TERMS = ("entropy", "entropy_normalised", "rank", "mode")
"""Terms that need the attention interface only, not a registered architecture."""

TOKEN_TERMS = ("norm_x", "norm_dx", "nonfinite_x", "nonfinite_dx")

TERMS = (*ATTENTION_TERMS, "entropy_bound", *WEIGHT_TERMS, *TOKEN_TERMS)

DEFAULT_TERMS = (*ATTENTION_TERMS, "sigma_qk", "sec", "sec_curve", *TOKEN_TERMS)

MAP_SIZE = 64
"""Longer maps are subsampled to this many rows and bins of keys."""


def resolve_terms(terms: Any) -> frozenset[str]:
    """Return the names that "all", "default" or a list of names stands for.

    Raises:
        ValueError: for anything else, or a name that is not in `TERMS`.
    """
    groups = {"all": TERMS, "default": DEFAULT_TERMS}
    if isinstance(terms, str) and terms in groups:
        return frozenset(groups[terms])
    if isinstance(terms, str) or not isinstance(terms, Iterable):
        raise ValueError(
            f'terms must be "all", "default" or a list of names, got {terms!r}; names are '
            f"{', '.join(TERMS)}"
        )
    unknown = [term for term in terms if term not in TERMS]
    if unknown:
        raise ValueError(f"unknown term {unknown[0]!r}; known are {', '.join(TERMS)}")
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


@dataclass
class Records:
    """What one probe has recorded: for each quantity, a mapping from layer name to its value.

    Layers are blocks, by their qualified name, in the order of the model; attention that
    belongs to no known block, or is a block's second, goes by the name of its own module. Values
    are float32 tensors on the model's device, mostly (heads,) or (), means over what ran.

    Attributes:
        entropy: (heads,) nats, mean over the rows that see a key.
        entropy_normalised: (heads,) in [0, 1], mean over rows of entropy / log(visible keys);
            NaN where no row sees two.
        entropy_bound: (heads,) nats, Theorem 3.1's lower bound (Zhai et al. 2023) from the
            spectra of Wq^T Wk and of the tokens; far below the entropy as a rule.
        rank: (heads,) `rank_share` of the subsampled map of the first sequence, in [0, 1].
        mode: for each head "normal", "benign" or "malignant" (Qi et al. 2025), or "undefined"
            for a map that is not finite.
        maps: (chosen heads that the layer has, n, n) attention of the first sequence, n <=
            `MAP_SIZE`: of a longer one n sampled rows, their keys summed in n equal bins.
        sigma_wq: () largest singular value of the effective Wq; likewise `sigma_wk`, `sigma_wv`,
            `sigma_wo`, `sigma_w1`, `sigma_w2`, and of the product in `sigma_w2w1`.
        sigma_qk: (heads,) largest singular value of Wq^T Wk; `sigma_ov` that of Wo Wv.
        norm_gamma1: () l2 norm of the first norm's gain; likewise `norm_beta1`, `norm_gamma2`,
            `norm_beta2`. Blocks without that parameter are missing.
        sec: (heads,) spectral energy concentration SEC(d_q, 4) of Wq^T Wk.
        sec_curve: (n,) SEC(d_q, s) at s = 1, 2, 4, ..., the powers of two up to d_q, of the head
            with the highest `sec`.
        stable_rank: (heads,) stable rank of Wq^T Wk.
        norm_x: () l2 norm of the block's whole input, over batch, tokens and features.
        norm_dx: () l2 norm of the loss's gradient with respect to it.
        nonfinite_x: () number of NaN and infinite entries of the input, summed over forwards.
        nonfinite_dx: () the same for the gradient.
        counts: quantity -> layer -> how many values its mean is of, (heads,) or ().
    """

    entropy: dict[str, Tensor] = field(default_factory=dict)
    entropy_normalised: dict[str, Tensor] = field(default_factory=dict)
    entropy_bound: dict[str, Tensor] = field(default_factory=dict)
    rank: dict[str, Tensor] = field(default_factory=dict)
    mode: dict[str, list[str]] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    sigma_wq: dict[str, Tensor] = field(default_factory=dict)
    sigma_wk: dict[str, Tensor] = field(default_factory=dict)
    sigma_wv: dict[str, Tensor] = field(default_factory=dict)
    sigma_wo: dict[str, Tensor] = field(default_factory=dict)
    sigma_w1: dict[str, Tensor] = field(default_factory=dict)
    sigma_w2: dict[str, Tensor] = field(default_factory=dict)
    sigma_qk: dict[str, Tensor] = field(default_factory=dict)
    sigma_ov: dict[str, Tensor] = field(default_factory=dict)
    sigma_w2w1: dict[str, Tensor] = field(default_factory=dict)
    norm_gamma1: dict[str, Tensor] = field(default_factory=dict)
    norm_beta1: dict[str, Tensor] = field(default_factory=dict)
    norm_gamma2: dict[str, Tensor] = field(default_factory=dict)
    norm_beta2: dict[str, Tensor] = field(default_factory=dict)
    sec: dict[str, Tensor] = field(default_factory=dict)
    sec_curve: dict[str, Tensor] = field(default_factory=dict)
    stable_rank: dict[str, Tensor] = field(default_factory=dict)
    norm_x: dict[str, Tensor] = field(default_factory=dict)
    norm_dx: dict[str, Tensor] = field(default_factory=dict)
    nonfinite_x: dict[str, Tensor] = field(default_factory=dict)
    nonfinite_dx: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain lists and numbers for JSON, without empty quantities; NaN, inf as None."""
        return {
            quantity.name: {layer: _plain(value) for layer, value in values.items()}
            for quantity in fields(self)
            if quantity.name != "counts" and (values := getattr(self, quantity.name))
        }

    def weights(self) -> dict[str, dict[str, Any]]:
        """Return `counts` as plain lists and numbers."""
        return {
            name: {layer: _plain(count) for layer, count in by_layer.items()}
            for name, by_layer in self.counts.items()
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str) or math.isfinite(value) else None

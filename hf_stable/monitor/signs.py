"""Signs of trouble on single heads: what one probe shows beside those before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hf_stable.monitor.thresholds import Thresholds

__all__ = ["QUANTITY_OF_SIGN", "SignWindow", "Values", "excess"]

PROBE_WINDOW = 8
"""Probes over which drop and growth are taken."""

Values = Mapping[str, Sequence[float | None]]
"""Per layer one value per head; None where it is not defined."""

QUANTITY_OF_SIGN = {
    "malignant": "entropy_normalised",
    "drop": "fall of entropy_normalised",
    "growth": "growth of sigma_qk",
    "concentration": "sec",
}
"""What was compared with a threshold, by the sign that it is."""

Signs = dict[str, tuple[float, float]]
"""Value and threshold of each sign, by "layer|head|sign"."""


def excess(key: str, value: float, threshold: float) -> float:
    """Return how far beyond its threshold a sign is; 1 is at it."""
    ratio = value / threshold if threshold else 1.0
    return 1 / max(ratio, 1e-9) if key.endswith("|malignant") else ratio


class SignWindow:
    """The last probes, in which a fall of the entropy and a growth of sigma_1(Wq^T Wk) are seen."""

    def __init__(self) -> None:
        """Begin with no probe."""
        self._history: dict[str, list[Values]] = {"sigma_qk": [], "entropy_normalised": []}

    def find(self, quantities: Mapping[str, Values], limits: Thresholds) -> Signs:
        """Return the signs of a probe beside those before it, then count it among them."""
        found = dict(self._of_entropy(quantities, limits))
        found |= self._of_spectra(quantities, limits)
        for name, history in self._history.items():
            history.append(dict(quantities.get(name, {})))
            del history[:-PROBE_WINDOW]
        return found

    def state(self) -> dict[str, Any]:
        """Return the window, for JSON."""
        return {name: list(probes) for name, probes in self._history.items()}

    def load_state(self, state: Mapping[str, Sequence[Values]]) -> None:
        """Continue from a `state()`."""
        self._history = {name: list(probes) for name, probes in state.items()}

    def _of_entropy(
        self, quantities: Mapping[str, Values], limits: Thresholds
    ) -> Iterator[tuple[str, tuple[float, float]]]:
        for layer, shares in quantities.get("entropy_normalised", {}).items():
            ranks = [*quantities.get("rank", {}).get(layer, ()), *[None] * len(shares)]
            before = self._past("entropy_normalised", layer, len(shares), max, -math.inf)
            for head, (share, rank) in enumerate(zip(shares, ranks, strict=False)):
                if share is None:
                    continue
                if rank is not None and share < limits.entropy_share and rank < limits.rank_share:
                    yield f"{layer}|{head}|malignant", (share, limits.entropy_share)
                drop = before[head] - share
                if drop > limits.entropy_drop:
                    yield f"{layer}|{head}|drop", (drop, limits.entropy_drop)

    def _of_spectra(
        self, quantities: Mapping[str, Values], limits: Thresholds
    ) -> Iterator[tuple[str, tuple[float, float]]]:
        for layer, sigmas in quantities.get("sigma_qk", {}).items():
            before = self._past("sigma_qk", layer, len(sigmas), min, math.inf)
            secs = [*quantities.get("sec", {}).get(layer, ()), *[None] * len(sigmas)]
            for head, (sigma, sec) in enumerate(zip(sigmas, secs, strict=False)):
                growth = sigma / before[head] if sigma is not None and before[head] > 0 else 0.0
                if growth > limits.sigma_growth:
                    yield f"{layer}|{head}|growth", (growth, limits.sigma_growth)
                if sec is not None and sec > limits.sec and growth > limits.sigma_growth / 2:
                    yield f"{layer}|{head}|concentration", (sec, limits.sec)

    def _past(
        self,
        name: str,
        layer: str,
        count: int,
        extreme: Callable[..., float],
        none: float,
    ) -> list[float]:
        """Return each head's extreme value within the window; one that hides where none is."""
        rows = [probe[layer] for probe in self._history[name] if layer in probe]

        def known(head: int) -> Iterable[float]:
            return (row[head] for row in rows if head < len(row) and row[head] is not None)  # type: ignore[misc]  # None is left out

        return [extreme(known(head), default=none) for head in range(count)]

"""The numbers of a probe that go into the Trainer's record, by the keys of their terms.

`stability/<quantity>/min` or `/max` is the worst value over heads and layers, `/mean` their mean,
`/worst_layer` the number of the block (of the weight for a rate) with the worst, and `/<n>` the
worst head of block n. Which keys a quantity has, `hf_stable.monitor.terms` says. Everything per
layer and head is in `stability.jsonl`, under the same quantity names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_stable.monitor.terms import UNUSED_SHARE, Term, find_term

__all__ = ["aggregate"]


def aggregate(
    quantities: Mapping[str, Mapping[str, Any]], *, layers: bool = False
) -> dict[str, float]:
    """Return the record's numbers, by key, of what a probe recorded.

    Args:
        quantities: quantity -> layer -> number, list of numbers per head, or None.
        layers: also one key per layer.

    Returns:
        Finite numbers only: what is not defined has no key.
    """
    logs: dict[str, float] = {}
    for name, by_layer in quantities.items():
        term = find_term(name)
        if term.counts:
            logs[term.log_keys[0]] = math.fsum(_numbers(list(by_layer.values())))
        elif term.log_keys:
            logs |= _extremes(term, by_layer, layers)
    modes = [mode for heads in quantities.get("mode", {}).values() for mode in heads]
    if modes:
        logs["stability/malignant_heads"] = float(modes.count("malignant"))
        logs["stability/benign_heads"] = float(modes.count("benign"))
    shares = list(_numbers(list(quantities.get("entropy_normalised", {}).values())))
    if shares:
        unused = sum(share >= UNUSED_SHARE for share in shares)
        logs["stability/unused_heads"] = unused / len(shares)
    return logs


def _extremes(term: Term, by_layer: Mapping[str, Any], layers: bool) -> dict[str, float]:
    worst_of = min if term.low_is_bad else max
    numbers = [list(_numbers(value)) for value in by_layer.values()]
    everything = [number for per_layer in numbers for number in per_layer]
    if not everything:
        return {}
    worst = {index: worst_of(values) for index, values in enumerate(numbers) if values}
    values = (
        worst_of(everything),
        math.fsum(everything) / len(everything),
        float(worst_of(worst, key=lambda index: worst[index])),
    )
    logs = dict(zip(term.log_keys, values, strict=True))
    if layers:
        logs |= {f"stability/{term.name}/{index}": value for index, value in worst.items()}
    return logs


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            yield from _numbers(entry)
    elif value is not None and math.isfinite(value):
        yield value

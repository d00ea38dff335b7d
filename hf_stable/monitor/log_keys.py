"""Which numbers of a probe go into the Trainer's record, and under which names.

| key | what it is |
|---|---|
| `stability/entropy/min`, `/mean` | attention entropy in nats, over heads and layers |
| `stability/entropy_normalised/min`, `/mean` | the same over log(visible keys), 0 to 1 |
| `stability/entropy_bound/min`, `/mean` | lower bound of Theorem 3.1, nats |
| `stability/rank/min`, `/mean` | rank of the attention maps, 0 (one direction) to 1 |
| `stability/stable_rank/min`, `/mean` | stable rank of Wq^T Wk |
| `stability/sec/max`, `/mean` | spectral energy concentration SEC(d_q, 4) of Wq^T Wk |
| `stability/sigma_qk/max`, `/mean` | largest singular value of Wq^T Wk per head |
| `stability/sigma_*/max`, `/mean` | of Wq, Wk, Wv, Wo, W1, W2, Wo Wv (`ov`), W2 W1 (`w2w1`) |
| `stability/norm_*/max`, `/mean` | l2 norms: block input `x`, its gradient `dx`, norms' gains |
| `stability/<quantity>/worst_layer` | number of the block (of the weight for a rate) with it |
| `stability/<quantity>/<n>` | worst head of block n, with `log_layers=True` |
| `stability/nonfinite_x`, `nonfinite_dx` | NaN and infinite entries entering blocks, summed |
| `stability/malignant_heads`, `benign_heads` | how many maps have collapsed, and how |
| `stability/unused_heads` | share of heads at 99 % of their largest entropy: uniform, unused |
| `stability/gamma/max`, `/mean`, `/worst_layer` | gamma of sigma layers |
| `stability/effective_lr/min`, `/mean` | rates that AdamW2 really used |
| `stability/clipped_share` | share of matrices whose rate AdamW2 clipped |
| `stability/sharpness`, `sharpness_threshold` | Hessian's top eigenvalue, where loss goes up |
| `stability/sharpness_preconditioned` | 1: of Adam's preconditioned Hessian; 0: of the plain one |
| `stability/nonfinite_steps` | steps so far with a NaN or infinite loss or gradient |
| `stability/alarms`, `rollbacks` | how many so far |

Everything per layer and head is in `stability.jsonl`, under the same quantity names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["UNUSED_SHARE", "aggregate"]

LOW_IS_BAD = (
    "entropy", "entropy_normalised", "entropy_bound", "rank", "stable_rank", "effective_lr",
)  # fmt: skip

COUNTS = ("nonfinite_x", "nonfinite_dx")

LEFT_OUT = ("mode", "maps", "sec_curve")
"""No numbers per head; the report draws them."""

UNUSED_SHARE = 0.99
"""A head whose entropy is at least this share of log T looks everywhere alike: it is not used."""


def aggregate(
    quantities: Mapping[str, Mapping[str, Any]], *, layers: bool = False
) -> dict[str, float]:
    """Return the keys of the table above from what a probe recorded.

    Args:
        quantities: quantity -> layer -> number, list of numbers per head, or None.
        layers: also one key per layer.

    Returns:
        Finite numbers only: what is not defined has no key.
    """
    logs: dict[str, float] = {}
    for name, by_layer in quantities.items():
        if name in LEFT_OUT:
            continue
        if name in COUNTS:
            logs[f"stability/{name}"] = math.fsum(_numbers(list(by_layer.values())))
        else:
            logs |= _extremes(name, by_layer, layers)
    modes = [mode for heads in quantities.get("mode", {}).values() for mode in heads]
    if modes:
        logs["stability/malignant_heads"] = float(modes.count("malignant"))
        logs["stability/benign_heads"] = float(modes.count("benign"))
    shares = list(_numbers(list(quantities.get("entropy_normalised", {}).values())))
    if shares:
        unused = sum(share >= UNUSED_SHARE for share in shares)
        logs["stability/unused_heads"] = unused / len(shares)
    return logs


def _extremes(name: str, by_layer: Mapping[str, Any], layers: bool) -> dict[str, float]:
    kind, worst_of = ("min", min) if name in LOW_IS_BAD else ("max", max)
    numbers = [list(_numbers(value)) for value in by_layer.values()]
    everything = [number for per_layer in numbers for number in per_layer]
    if not everything:
        return {}
    worst = {index: worst_of(values) for index, values in enumerate(numbers) if values}
    logs = {
        f"stability/{name}/{kind}": worst_of(everything),
        f"stability/{name}/mean": math.fsum(everything) / len(everything),
        f"stability/{name}/worst_layer": float(worst_of(worst, key=lambda index: worst[index])),
    }
    if layers:
        logs |= {f"stability/{name}/{index}": value for index, value in worst.items()}
    return logs


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            yield from _numbers(entry)
    elif value is not None and math.isfinite(value):
        yield value

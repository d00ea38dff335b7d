"""What to try after an alarm, which depends on what the run has in place already."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

__all__ = ["Remedy", "advise"]

Remedy = Literal["sigma_reparam", "adamw2"]
"""What a run may have in place: a model patched with sigmaReparam, the optimizer AdamW2."""

SPIKE = (
    "look at the batches of these steps; lower the learning rate or clip gradients (max_grad_norm)"
)
NONFINITE = (
    "resume from an earlier checkpoint with a lower learning rate; in half precision try bf16, and "
    "look for the first layer with a count in stability.jsonl"
)


def advise(kind: str, in_place: Collection[Remedy] = ()) -> str:
    """Return what to try after an alarm of a kind, without what is in place already.

    Args:
        kind: "collapse", "spike" or "nonfinite".
        in_place: the remedies that the run has.

    Raises:
        ValueError: for a kind or a remedy that is none.
    """
    unknown = set(in_place) - set(get_args(Remedy))
    if unknown:
        raise ValueError(f"remedies are {', '.join(get_args(Remedy))}; got {sorted(unknown)}")
    if kind == "spike":
        return SPIKE
    if kind == "nonfinite":
        return NONFINITE
    if kind != "collapse":
        raise ValueError(f"alarms are of the kinds collapse, spike and nonfinite, got {kind!r}")
    if "adamw2" in in_place:
        text = "lower the learning rate or AdamW2's tau, or warm the rate up"
    else:
        text = "lower the learning rate, warm it up, or use optim='adamw2'"
    if "sigma_reparam" in in_place:
        return text
    return f"{text}; hf_stable.patch(model, 'sigma_reparam') bounds what grows here"

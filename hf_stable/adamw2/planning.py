"""tau from the length of a run: a short one needs a larger bound to come as far as a long one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

__all__ = [
    "AUTO",
    "DEFAULT_TAU",
    "DISTANCE",
    "HIGHEST_TAU",
    "choose_tau",
    "note_other_plan",
    "plan_tau",
]

AUTO = "auto"
"""In tau's place: derive it from the number of steps."""

DEFAULT_TAU = 0.01
"""What the paper takes for GPT, and the lowest that is derived: longer runs need no lower one."""

DISTANCE = 0.15
"""How far a run lets a weight get, as a share of its size, if its steps point in unrelated
directions. `recipes/evidence/tau.py` fixed it: between 20 and 100 steps at the full rate, the tau
that does best falls with the number of steps, but more slowly than its inverse."""

HIGHEST_TAU = 0.1
"""The highest tau that is derived. Momentum at beta1 = 0.9 points the same way for about ten steps;
at a tenth each, these turn a weight by as much as it is large, and the bound binds no more."""


def plan_tau(steps: float) -> float:
    """Return the tau at which a weight gets as far in a short run as in a long one.

    A step moves a weight by at most tau times its size (Qi et al. 2025, Rule 1). Steps that point
    in unrelated directions add up as those of a random walk, to `tau * sqrt(steps)`. The tau of
    which that is `DISTANCE` is taken, but none below `DEFAULT_TAU`, which holds from 225 steps on,
    and none above `HIGHEST_TAU`, which holds for one or two.

    Args:
        steps: of the run, at its highest rate; where a schedule lowers the rate, the sum over the
            steps of the rate over the highest one.
    """
    return min(max(DISTANCE / math.sqrt(steps), DEFAULT_TAU), HIGHEST_TAU)


def choose_tau(tau: Any, total_steps: Any) -> Any:
    """Return tau as it is, or the one that is derived where it is "auto".

    Raises:
        ValueError: for "auto" without a number of steps, and a number of steps without "auto".
    """
    if tau != AUTO:
        if total_steps is not None:
            raise ValueError(
                f"AdamW2 got total_steps={total_steps!r} beside tau={tau!r}: total_steps is what "
                "tau='auto' derives tau from, so give either tau='auto' or no total_steps"
            )
        return tau
    if total_steps is None:
        raise ValueError(
            "AdamW2 cannot derive tau='auto' without the length of the run: give total_steps, the "
            "number of its steps, or a number for tau"
        )
    is_number = isinstance(total_steps, Real) and not isinstance(total_steps, bool)
    if not is_number or not 1 <= total_steps < math.inf:
        raise ValueError(
            f"AdamW2 cannot use total_steps={total_steps!r}: give the number of steps of the run, "
            "1 or more"
        )
    return plan_tau(float(total_steps))


def note_other_plan(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Warn if groups that are loaded have another tau than these, and either was derived.

    The loaded one stays: a run that goes on takes the steps that it would have taken.

    Args:
        saved: groups of the loaded state.
        own: groups of the optimizer that loads it.
    """
    for theirs, ours in zip(saved, own, strict=False):
        derived = theirs.get("total_steps"), ours["total_steps"]
        if theirs.get("tau", ours["tau"]) != ours["tau"] and derived != (None, None):
            warnings.warn(
                f"AdamW2 goes on with {_told(theirs)}, as the loaded state says, and not with "
                f"{_told(ours)}; to change it, set 'tau' in the optimizer's param_groups",
                stacklevel=2,
            )
            return


def _told(group: Mapping[str, Any]) -> str:
    steps = group.get("total_steps")
    return f"tau={group['tau']:.4g}" + (f" (tau='auto' over {steps:g} steps)" if steps else "")

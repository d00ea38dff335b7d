"""When a run is in trouble: rules on losses and attention's indices, on plain numbers.

No single number decides. A run can train well with one head at low entropy and SEC .998, and a
healthy one can have SEC 1 under a small initialisation. So an alarm needs two things: signs on
heads, and a loss that is in trouble.

1. A *sign* is seen on a head at a probe. There are four kinds: `malignant` (low entropy and low
   rank), `drop` (the entropy fell by a large share of log T within the last probes), `growth`
   (sigma_1(Wq^T Wk) grew by a large factor within them) and `concentration` (SEC above 99 % and
   some growth). What a head shows at the first probe is no sign: a pretrained model has sinks.
2. A *collapse* is raised where enough heads have signs and the smoothed loss rises. It is also
   raised where most heads have signs and the last loss is high. Signs no longer count once the
   loss gets better than it was when they began.
3. A *collapse* is also raised where the loss stands still: enough heads are `malignant` for a long
   stretch without progress, in a run that has learnt little since its start. Progress before that
   stretch does not count, since a model learns the frequencies of its labels without attention.
4. A *spike* is a loss far beyond those of the window before (median and median absolute
   deviation).
5. *Nonfinite* is a NaN or infinite loss or gradient.

`recipes/evidence/alarms.py` measures how often this is right. When a loss counts as lost is said in
`hf_stable.measures.loss_curves.lost_step`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from hf_stable._json import as_json_value
from hf_stable.measures.loss_curves import FEWEST, SMOOTHING, WINDOW, noise
from hf_stable.monitor.advice import Remedy, advise
from hf_stable.monitor.signs import QUANTITY_OF_SIGN, SignWindow, Values, excess
from hf_stable.monitor.thresholds import Thresholds

__all__ = ["Alarm", "AlarmRules", "Thresholds"]


@dataclass(frozen=True)
class Alarm:
    """Something to act on.

    Attributes:
        kind: "collapse", "spike" or "nonfinite".
        step: optimizer step at which it was raised.
        quantity: what was compared, such as "sigma_qk" or "loss".
        value: what it was.
        threshold: what it was compared with.
        reason: one sentence.
        layer: the layer that shows it most, or None.
        head: the head in it, or None.
        in_place: remedies that the run has already, which the advice leaves out.
    """

    kind: str
    step: int
    quantity: str
    value: float
    threshold: float
    reason: str
    layer: str | None = None
    head: int | None = None
    in_place: tuple[Remedy, ...] = ()

    @property
    def advice(self) -> str:
        """What to try."""
        return advise(self.kind, self.in_place)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the advice, for JSON; None for infinite and NaN numbers."""
        fields = asdict(self) | {"advice": self.advice}
        del fields["in_place"]  # it is in the advice
        return as_json_value(fields)

    def __str__(self) -> str:
        """Name layer, head, value, threshold and what to try."""
        where = f" in {self.layer}" if self.layer is not None else ""
        where += f", head {self.head}" if self.head is not None else ""
        return (
            f"{self.kind} at step {self.step}{where}: {self.reason} ({self.quantity} "
            f"{self.value:.4g}, threshold {self.threshold:.4g}). To try: {self.advice}"
        )


@dataclass
class _Sign:
    """A sign on one head, since when, and the smoothed loss then."""

    step: int
    level: float
    acquitted: bool


class AlarmRules:
    """The rule of this module, fed step by step. The same losses and probes give the same alarms.

    Args:
        thresholds: other than the defaults.

    Attributes:
        in_place: remedies that the run has, which alarms do not advise.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        """Start with nothing seen."""
        self.thresholds = thresholds or Thresholds()
        self.in_place: tuple[Remedy, ...] = ()
        self._losses: list[float] = []
        self._noise = 0.0
        self._first = math.nan
        self._best = math.inf
        self._lowest, self._improved_at = math.inf, 0
        self._signs: dict[str, _Sign] = {}
        self._initial: set[str] = set()
        self._window = SignWindow()
        self._num_heads = 0
        self._strongest: dict[str, tuple[float, float]] = {}
        self._open: set[str] = set()

    def observe_loss(self, step: int, loss: float, gradients_finite: bool = True) -> list[Alarm]:
        """Take the loss of one optimizer step; return the alarms that begin with it."""
        finite = math.isfinite(loss) and gradients_finite
        if not finite:
            what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient", math.nan)
            reason = f"the {what} is not finite"
            return self._raise("nonfinite", step, what, value, math.inf, reason)
        self._open.discard("nonfinite")
        self._losses = [*self._losses[-WINDOW - SMOOTHING + 1 :], loss]
        self._noise = noise(self._losses[:-SMOOTHING])
        level = self.level
        if len(self._losses) <= SMOOTHING:
            self._first = level
        self._best = min(self._best, level)
        for sign in self._signs.values():
            sign.acquitted = sign.acquitted or self._improves(level, sign.level)
        slow = median(self._losses[-WINDOW // 2 :])
        if self._lowest == math.inf or self._improves(slow, self._lowest):
            self._lowest, self._improved_at = slow, step
        alarms = self._judge(step)
        if not self.is_rising:
            self._open.discard("spike")
            if not self._stalled(step) and not self._is_widespread:
                self._open.discard("collapse")
        return alarms

    def observe_probe(self, step: int, quantities: Mapping[str, Values]) -> list[Alarm]:
        """Take what a probe recorded (`Records.to_dict()`); return the alarms that begin.

        Quantities that were not recorded give no signs.
        """
        is_first = not self._num_heads
        self._num_heads = sum(map(len, quantities.get("entropy_normalised", {}).values()))
        found = self._window.find(quantities, self.thresholds)
        if is_first:
            self._initial = set(found)
        self._signs = {
            key: self._signs.get(key) or _Sign(step, self.level, acquitted=False)
            for key in found
            if key not in self._initial
        }
        self._strongest = found
        return self._judge(step)

    @property
    def level(self) -> float:
        """The smoothed loss: the median of the last few."""
        return median(self._losses[-SMOOTHING:]) if self._losses else math.inf

    @property
    def is_rising(self) -> bool:
        """Whether the smoothed loss has risen above its best beyond noise."""
        return self._exceeds(self.thresholds.rise, self.thresholds.rise_score)

    @property
    def is_suspicious(self) -> bool:
        """Whether a checkpoint of this moment is unfit to go back to."""
        return bool(self._open) or self.is_rising

    def state(self) -> dict[str, Any]:
        """Return all that was seen, for JSON: what there is no value of yet is None."""
        state = {
            "losses": self._losses,
            "first": self._first,
            "best": self._best,
            "lowest": self._lowest,
            "improved_at": self._improved_at,
            "signs": {key: asdict(sign) for key, sign in self._signs.items()},
            "initial": sorted(self._initial),
            "history": self._window.state(),
            "num_heads": self._num_heads,
            "strongest": {key: list(pair) for key, pair in self._strongest.items()},
            "open": sorted(self._open),
        }
        return as_json_value(state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`."""
        self._losses = list(state["losses"])
        self._noise = noise(self._losses[:-SMOOTHING])
        self._first = _number(state["first"], math.nan)
        self._best, self._lowest = (_number(state[k], math.inf) for k in ("best", "lowest"))
        self._improved_at = state["improved_at"]
        self._initial = set(state["initial"])
        self._signs = {
            key: _Sign(sign["step"], _number(sign["level"], math.inf), sign["acquitted"])
            for key, sign in state["signs"].items()
        }
        self._window.load_state(state["history"])
        self._num_heads = state["num_heads"]
        self._strongest = {key: (pair[0], pair[1]) for key, pair in state["strongest"].items()}
        self._open = set(state["open"])

    @property
    def _active(self) -> list[str]:
        """Signs that count."""
        return [key for key, sign in self._signs.items() if not sign.acquitted]

    @property
    def _heads(self) -> set[str]:
        """Heads that show one."""
        return {key.rpartition("|")[0] for key in self._active}

    @property
    def _is_widespread(self) -> bool:
        return 0 < self.thresholds.most_heads * self._num_heads <= len(self._heads)

    def _exceeds(self, share: float, score: float, *, last: bool = False) -> bool:
        """Whether the smoothed loss, or only the last one, is above the best beyond noise."""
        rise = (self._losses[-1] if last and self._losses else self.level) - self._best
        return rise > max(share * abs(self._best), score * self._noise) and math.isfinite(rise)

    def _improves(self, level: float, before: float) -> bool:
        return before - level > self.thresholds.improvement * abs(before)

    def _judge(self, step: int) -> list[Alarm]:
        alarms: list[Alarm] = []
        limits, active, heads = self.thresholds, self._active, self._heads
        is_rising = self.is_rising
        if self._is_widespread:  # waiting for the smoothed loss would cost some steps
            is_rising |= self._exceeds(limits.quick_rise, limits.quick_score, last=True)
        if is_rising and heads and len(heads) >= limits.heads * self._num_heads:
            alarms += self._collapse(step, active, "attention changes fast while the loss rises")
        elif stalled := self._stalled(step):
            reason = "all queries of a head look at the same few keys, and the loss stands still"
            alarms += self._collapse(step, stalled, reason)
        before = self._losses[:-SMOOTHING]
        if len(before) >= FEWEST:
            middle = median(before)
            threshold = middle + max(limits.spike * abs(middle), limits.spike_score * self._noise)
            if self.level > threshold:
                reason = f"the loss was {middle:.4g} ± {self._noise:.2g} in the steps before"
                alarms += self._raise("spike", step, "loss", self.level, threshold, reason)
        return alarms

    def _stalled(self, step: int) -> list[str]:
        """Return the signs under which the loss has stood still for too long."""
        limits = self.thresholds
        if not self._best > limits.learnt * self._first:
            return []
        starts = {
            key: max(sign.step, self._improved_at)
            for key, sign in self._signs.items()
            if key.endswith("|malignant")
        }
        found = [k for k, s in starts.items() if step - s >= max(limits.stall_steps, s // 2)]
        return found if len(found) >= limits.heads * self._num_heads else []

    def _collapse(self, step: int, keys: Sequence[str], reason: str) -> list[Alarm]:
        worst = max(keys, key=lambda key: excess(key, *self._strongest[key]))
        layer, head, sign = worst.split("|")
        value, threshold = self._strongest[worst]
        quantity = QUANTITY_OF_SIGN[sign]
        heads = len({key.rpartition("|")[0] for key in keys})
        reason += f"; {heads} of {self._num_heads} heads"
        return self._raise("collapse", step, quantity, value, threshold, reason, layer, int(head))

    def _raise(
        self,
        kind: str,
        step: int,
        quantity: str,
        value: float,
        threshold: float,
        reason: str,
        layer: str | None = None,
        head: int | None = None,
    ) -> list[Alarm]:
        if kind in self._open:
            return []
        self._open.add(kind)
        return [Alarm(kind, step, quantity, value, threshold, reason, layer, head, self.in_place)]


def _number(written: float | str | None, missing: float) -> float:
    """Return a number of a `state()`; 0.1.0 wrote those that are not finite as text."""
    return missing if written is None else float(written)

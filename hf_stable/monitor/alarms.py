"""When a run is in trouble: rules on losses and attention's indices, on plain numbers.

No single index decides. A run can train well with one head at low entropy and SEC .998, and a
healthy one can have SEC 1 under a small initialisation; so the rule reads level, trend, and what
the loss does after a sign appears:

1. A *sign* is seen on a head at a probe: `malignant` (low entropy and low rank), `drop` (its
   entropy fell by a large share of log T within the last probes), `growth` (sigma_1(Wq^T Wk) grew
   by a large factor within them) or `concentration` (SEC above 99 % and some growth). What was
   there at the first probe is none: a pretrained model's sinks are no collapse.
2. Collapse: signs on enough heads while the smoothed loss rises, or on most heads while the last
   loss is high. A sign is acquitted of this once the loss improves on its level at the onset.
3. Collapse too: `malignant` signs on enough heads for a long stretch in which the loss came down
   by nothing, in a run that has learnt little since it began. What the loss did before does not
   acquit: that a model learns how frequent its labels are needs no attention.
4. Spike: a loss far beyond those of the window before (median and median absolute deviation).
5. Nonfinite: a NaN or infinite loss or gradient.

How often it is right, `recipes/evidence/alarms.py` measures. A run is *lost* as
`hf_stable.measures.loss_curves.lost_step` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from hf_stable._json import as_json_value
from hf_stable.measures.loss_curves import FEWEST, SMOOTHING, WINDOW, noise

__all__ = ["Alarm", "AlarmRules", "Thresholds"]

PROBE_WINDOW = 8
"""Probes over which drop and growth are taken."""

Values = Mapping[str, Sequence[float | None]]
"""Per layer one value per head; None where it is not defined."""

ADVICE = {
    "collapse": "lower the learning rate, warm it up, or use optim='adamw2'; "
    "hf_stable.patch(model, 'sigma_reparam') bounds what grows here",
    "spike": "look at the batches of these steps; lower the learning rate or clip gradients "
    "(max_grad_norm)",
    "nonfinite": "resume from an earlier checkpoint with a lower learning rate; in half precision "
    "try bf16, and look for the first layer with a count in stability.jsonl",
}


@dataclass(frozen=True)
class Thresholds:
    """What counts as a sign, and as a rise of the loss.

    Attributes:
        entropy_share: entropy / log(visible keys) below which a head is sparse.
        rank_share: rank of the map below which a sparse head is malignant.
        entropy_drop: fall of the entropy share within the window.
        sigma_growth: factor of sigma_1(Wq^T Wk) within the window.
        sec: spectral energy concentration that counts, together with half that growth.
        heads: share of all heads that must show a sign (one head at least).
        most_heads: share of all heads whose signs make one bad loss enough.
        rise: share of the best smoothed loss by which it has to rise.
        rise_score: the same in units of the noise of the losses before.
        quick_rise: rise of the last loss, not smoothed, where most heads show a sign.
        quick_score: the same in units of the noise.
        spike: rise over the window's median that is an alarm without any sign.
        spike_score: the same in units of the noise. At 10, losses that go nowhere raise none in
            50,000 steps where they are lognormal with sigma 1, three where sigma is 1.5.
        improvement: share by which the loss has to come down: its smoothed level to acquit a sign,
            the median of half a window to be no stall.
        stall_steps: fewest steps with signs and without improvement that convict; half as many as
            the run had when they began if that is more.
        learnt: a run is past stalling once its loss is below this share of its first level.
    """

    entropy_share: float = 0.35
    rank_share: float = 0.3
    entropy_drop: float = 0.15
    sigma_growth: float = 4.0
    sec: float = 0.99
    heads: float = 0.1
    most_heads: float = 0.5
    rise: float = 0.1
    rise_score: float = 5.0
    quick_rise: float = 0.05
    quick_score: float = 3.0
    spike: float = 0.5
    spike_score: float = 10.0
    improvement: float = 0.01
    stall_steps: int = 50
    learnt: float = 0.7


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
    """

    kind: str
    step: int
    quantity: str
    value: float
    threshold: float
    reason: str
    layer: str | None = None
    head: int | None = None

    @property
    def advice(self) -> str:
        """What to try."""
        return ADVICE[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the advice, for JSON; None for infinite and NaN numbers."""
        return as_json_value(asdict(self) | {"advice": self.advice})

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
    """The rule of this module, fed step by step; deterministic, so a replay alarms alike.

    Args:
        thresholds: other than the defaults.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        """Start with nothing seen."""
        self.thresholds = thresholds or Thresholds()
        self._losses: list[float] = []
        self._noise = 0.0
        self._first = math.nan
        self._best = math.inf
        self._lowest, self._improved_at = math.inf, 0
        self._signs: dict[str, _Sign] = {}
        self._initial: set[str] = set()
        self._history: dict[str, list[Values]] = {"sigma_qk": [], "entropy_normalised": []}
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
        found = self._find_signs(quantities)
        if is_first:
            self._initial = set(found)
        self._signs = {
            key: self._signs.get(key) or _Sign(step, self.level, acquitted=False)
            for key in found
            if key not in self._initial
        }
        self._strongest = found
        for name, history in self._history.items():
            history.append(dict(quantities.get(name, {})))
            del history[:-PROBE_WINDOW]
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
        """Whether a checkpoint of this moment should not be gone back to."""
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
            "history": self._history,
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
        self._history = {name: list(probes) for name, probes in state["history"].items()}
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
        def excess(key: str) -> float:
            value, threshold = self._strongest[key]
            above = value / threshold if threshold else 1.0
            return 1 / max(above, 1e-9) if key.endswith("|malignant") else above

        worst = max(keys, key=excess)
        layer, head, sign = worst.split("|")
        value, threshold = self._strongest[worst]
        quantity = {
            "malignant": "entropy_normalised",
            "drop": "fall of entropy_normalised",
            "growth": "growth of sigma_qk",
            "concentration": "sec",
        }[sign]
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
        return [Alarm(kind, step, quantity, value, threshold, reason, layer, head)]

    def _find_signs(self, quantities: Mapping[str, Values]) -> dict[str, tuple[float, float]]:
        """Return value and threshold of each sign, by "layer|head|sign"."""
        limits = self.thresholds
        found: dict[str, tuple[float, float]] = {}
        for layer, shares in quantities.get("entropy_normalised", {}).items():
            ranks = quantities.get("rank", {}).get(layer, [None] * len(shares))
            before = self._past("entropy_normalised", layer, len(shares), max)
            for head, (share, rank) in enumerate(zip(shares, ranks, strict=True)):
                if share is None:
                    continue
                if rank is not None and share < limits.entropy_share and rank < limits.rank_share:
                    found[f"{layer}|{head}|malignant"] = share, limits.entropy_share
                if before[head] - share > limits.entropy_drop:
                    drop = before[head] - share
                    found[f"{layer}|{head}|drop"] = drop, limits.entropy_drop
        for layer, sigmas in quantities.get("sigma_qk", {}).items():
            before = self._past("sigma_qk", layer, len(sigmas), min)
            secs = quantities.get("sec", {}).get(layer, [None] * len(sigmas))
            for head, (sigma, sec) in enumerate(zip(sigmas, secs, strict=True)):
                growth = sigma / before[head] if sigma is not None and before[head] > 0 else 0.0
                if growth > limits.sigma_growth:
                    found[f"{layer}|{head}|growth"] = growth, limits.sigma_growth
                if sec is not None and sec > limits.sec and growth > limits.sigma_growth / 2:
                    found[f"{layer}|{head}|concentration"] = sec, limits.sec
        return found

    def _past(self, name: str, layer: str, count: int, extreme: Any) -> list[float]:
        """Return each head's extreme value within the window; a value that hides where none is."""
        rows = [probe[layer] for probe in self._history[name] if layer in probe]
        none = -math.inf if extreme is max else math.inf
        return [
            extreme((row[h] for row in rows if row[h] is not None), default=none)
            for h in range(count)
        ]


def _number(written: float | str | None, missing: float) -> float:
    """Return a number of a `state()`; 0.1.0 wrote those that are not finite as text."""
    return missing if written is None else float(written)

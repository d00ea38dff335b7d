"""The numbers by which alarms are raised."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

__all__ = ["Thresholds"]


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
        most_heads: share of all heads with signs beyond which a single bad loss is enough.
        rise: share of the best smoothed loss by which it has to rise.
        rise_score: the same in units of the noise of the losses before.
        quick_rise: rise of the last loss, not smoothed, where most heads show a sign.
        quick_score: the same in units of the noise.
        spike: rise over the window's median that is an alarm without any sign.
        spike_score: the same in units of the noise. At 10, losses that go nowhere raise none in
            50,000 steps where they are lognormal with sigma 1, three where sigma is 1.5.
        improvement: share by which the loss has to come down. By so much the smoothed loss ends
            the signs, and by so much the median of half a window has to fall to be no stall.
        stall_steps: fewest steps with signs and without improvement that raise an alarm. Half the
            steps before the signs began are needed if that is more.
        learnt: a run is past stalling once its loss is below this share of its first level.

    Raises:
        ValueError: for what is no number; infinity is one, and keeps an alarm from being raised.
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

    def __post_init__(self) -> None:
        """Check the numbers: nothing is above or below NaN, which would end an alarm unseen."""
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or math.isnan(value):
                raise ValueError(
                    f"threshold {field.name} is a number ({field.default:g} by default), "
                    f"got {value!r}"
                )

"""The curves of a training as a picture for its model card. Needs matplotlib, where it is there."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

__all__ = ["PICTURE_FILE", "draw_curves"]

PICTURE_FILE = "training_curves.png"

PANELS = {
    "loss": {"training": "loss", "evaluation": "eval_loss"},
    "attention entropy (nats)": {
        "lowest head": "stability/entropy/min",
        "mean of all heads": "stability/entropy/mean",
    },
}
"""Titles of the panels; in each, the curves by label, and the key of their values in the log."""


def draw_curves(history: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str]) -> str | None:
    """Draw loss and attention entropy over steps, as far as they were logged.

    Args:
        history: the Trainer's `log_history`.
        folder: where `PICTURE_FILE` goes.

    Returns:
        The name of the file; None where no curve has two points or matplotlib is not installed.

    Raises:
        OSError: if the file cannot be written.
    """
    panels = {title: _curves(history, keys) for title, keys in PANELS.items()}
    drawn = {title: curves for title, curves in panels.items() if curves}
    if not drawn or find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(drawn), 2.8), layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (title, curves) in zip(axes, drawn.items(), strict=True):
        for label, points in curves.items():
            panel.plot(*zip(*points, strict=True), label=label)
        panel.set_title(title)
        panel.set_xlabel("optimizer step")
        panel.legend(frameon=False)
    figure.savefig(os.path.join(folder, PICTURE_FILE), dpi=120)
    return PICTURE_FILE


def _curves(
    history: Sequence[Mapping[str, Any]], keys: Mapping[str, str]
) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of each key that was logged at two steps or more; NaN breaks a line."""
    curves = {
        label: [(record["step"], record[key]) for record in history if key in record]
        for label, key in keys.items()
    }
    return {
        label: points
        for label, points in curves.items()
        if sum(math.isfinite(value) for _, value in points) > 1
    }

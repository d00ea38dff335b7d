"""Alerts in experiment trackers that have alerts of their own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

__all__ = ["alert_trackers"]


def alert_trackers(report_to: Sequence[str], title: str, text: str) -> None:
    """Raise an alert in the trackers that have alerts of their own: trackio.

    A tracker that fails, or is too old to have alerts, is warned of; training goes on.

    Args:
        report_to: `TrainingArguments.report_to`.
        title: a few words.
        text: the rest.
    """
    if "trackio" not in report_to:
        return
    try:
        import trackio

        trackio.alert(title=title, text=text, level=trackio.AlertLevel.ERROR)
    except Exception as error:
        warnings.warn(
            f"trackio took no alert ({type(error).__name__}: {error}); training goes on",
            UserWarning,
            stacklevel=4,
        )

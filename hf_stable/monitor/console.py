"""What a monitor puts on the console: lines of its own at alarms, one short part of a record."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, get_args

from tqdm import tqdm

from hf_stable._wording import short_names
from hf_stable.monitor.options import Console
from hf_stable.monitor.terms import find_term

__all__ = ["SHORT_KEY", "say", "shorten", "summarise"]

SHORT_KEY = "stability"
"""Under which the short part stands in what is printed."""

MOST_CHARACTERS = 96
"""Of the short part: transformers' progress bar leaves out texts of more than a hundred."""

RED = "\033[1;31m"
PLAIN = "\033[0m"


def say(message: str, *, is_alarm: bool = False) -> None:
    """Print one line to stderr, above progress bars; an alarm in red where a terminal has colours.

    Args:
        message: may hold names of a user's modules: what a terminal would obey is taken out.
        is_alarm: whether it has to stand out.
    """
    line = f"hf-stable: {''.join(c if c.isprintable() else '?' for c in message)}"
    tqdm.write(f"{RED}{line}{PLAIN}" if is_alarm and _has_colours() else line, file=sys.stderr)


def summarise(quantities: Mapping[str, Mapping[str, Any]], num_alarms: int) -> str:
    """Return the lowest entropy share, the largest sigma(Wq^T Wk), where they are, and alarms.

    Args:
        quantities: of the last probe, as `Records.to_dict` has them.
        num_alarms: so far.

    Returns:
        At most `MOST_CHARACTERS`, without the names of layers where they do not fit.
    """
    for with_places in (True, False):
        parts = []
        for name, label, form in (
            ("entropy_normalised", "entropy", "{:.0%}"),
            ("sigma_qk", "sigma_qk", "{:.3g}"),
        ):
            worst = _worst(name, quantities.get(name, {}))
            if worst is not None:
                value, place = worst
                parts.append(f"{label} {form.format(value)}" + f" ({place})" * with_places)
        parts.append("1 alarm" if num_alarms == 1 else f"{num_alarms} alarms")
        text = ", ".join(parts)
        if len(text) <= MOST_CHARACTERS:
            break
    return text


def shorten(record: Mapping[str, Any], console: Console, short: str | None) -> dict[str, Any]:
    """Return what of a record is printed.

    Args:
        record: of the Trainer, with the monitor's keys.
        console: "full" has all keys, "short" one in place of the monitor's, "off" none of them.
        short: `summarise` of the last probe; None if this record has no probe.
    """
    assert console in get_args(Console)
    if console == "full":
        return dict(record)
    shown = {k: v for k, v in record.items() if not k.startswith("stability/")}
    if console == "short" and short is not None and len(shown) < len(record):
        shown[SHORT_KEY] = short
    return shown


def _worst(name: str, by_layer: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return the worst value of a quantity of heads, and its layer and head in a few words."""
    short = short_names(list(by_layer))
    known = [
        (value, f"layer {short[layer]} head {head}")
        for layer, heads in by_layer.items()
        for head, value in enumerate(heads)
        if value is not None
    ]
    return (min if find_term(name).low_is_bad else max)(known, default=None)


def _has_colours() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stderr.isatty() and not plain

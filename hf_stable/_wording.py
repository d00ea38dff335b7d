"""Words that errors, messages and pages share."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence

__all__ = ["extra_needed", "nearest", "printable", "short_names", "shortened"]


def nearest(given: object, allowed: Iterable[object]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed value, or nothing."""
    names = {str(value).lower(): str(value) for value in allowed}
    close = difflib.get_close_matches(str(given).lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def extra_needed(what: str, extra: str, missing: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error of something that needs a package of one of our extras.

    Args:
        what: needs it, such as "the page".
        extra: brings it.
        missing: the error of its import.
    """
    package = (missing.name or "a package").split(".")[0]
    return ModuleNotFoundError(
        f"{what} needs {package}, which comes with the {extra} extra: "
        f'pip install "hf-stable[{extra}]"',
        name=package,
    )


def short_names(layers: Sequence[str]) -> dict[str, str]:
    """Return for each layer what tells it from the others: `vit.layers.3` -> `3`."""
    parts = [layer.split(".") for layer in layers]
    if len(parts) < 2:
        return {layer: layer.rpartition(".")[2] for layer in layers}
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest - 1)
    stop = next((i for i in range(shortest - start) if len({p[-1 - i] for p in parts}) > 1), 0)
    return {
        layer: ".".join(part[start : len(part) - stop])
        for layer, part in zip(layers, parts, strict=True)
    }


_shortener = reprlib.Repr()
_shortener.maxlevel, _shortener.maxdict, _shortener.maxlist, _shortener.maxtuple = 3, 4, 6, 6
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 80


def shortened(value: object) -> str:
    """Return a value as an error quotes it, however long or deeply nested it is."""
    return _shortener.repr(value)


def printable(text: str) -> str:
    """Return text with what a terminal would obey spelled out: escapes, controls, directions.

    Names of tensors and layers, folders and alarms come from other people's files. Line ends stay.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )

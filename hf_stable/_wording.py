"""Words that errors, messages and pages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["extra_needed", "nearest", "short_names"]


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

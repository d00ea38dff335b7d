"""What a config.json may have built where a checkpoint is only looked at: what its weights bear.

A number of a few bytes, such as a thousand million layers, would otherwise be built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_parameter_registration_hook

from hf_stable.architectures.registry import UnsupportedModelError

__all__ = ["bounded_content", "bounded_building"]

MOST = 1 << 20
"""What a number in a config may be at least, whatever the weights: the longest contexts are so."""

MOST_LABELS = 1 << 16
"""Labels whose names are made up; the head that they belong to is not looked at."""

SPARE_PARAMETERS = 4096
"""Beyond four times its tensors on disk, of which there may be one shard of many."""

Shapes = Mapping[str, tuple[int, ...]]


def bounded_content(content: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Return a config's content with no more labels than are needed.

    Raises:
        UnsupportedModelError: if it has a number that the weights do not bear out.
    """
    largest = max((side for shape in shapes.values() for side in shape), default=0)
    for path, number in _numbers(content):
        if path != "num_labels" and number > max(MOST, largest):
            raise UnsupportedModelError(
                f"config.json says {path}={number}, and the largest side of a weight is {largest}: "
                "nothing is built from it"
            )
    labels = content.get("num_labels")
    if isinstance(labels, int) and labels > MOST_LABELS:
        return {**content, "num_labels": MOST_LABELS}
    return content


@contextmanager
def bounded_building(shapes: Shapes) -> Iterator[None]:
    """Stop the building of a model that has far more parameters than there are tensors.

    Raises:
        UnsupportedModelError: then.
    """
    most, count = 4 * len(shapes) + SPARE_PARAMETERS, 0

    def look(module: Any, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UnsupportedModelError(
                f"config.json describes a model of more than {most} parameters, and there are "
                f"{len(shapes)} tensors: it is not built"
            )

    handle = register_module_parameter_registration_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _numbers(content: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer of a config, and where it is."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, path)
    elif isinstance(content, int):
        yield path, content

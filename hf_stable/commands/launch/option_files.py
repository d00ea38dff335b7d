"""YAML files of options, read as what anybody may have written: bounded in size, depth and aliases.

A file of a few hundred bytes can stand for gigabytes, by aliases of aliases, or end the process, by
brackets in brackets.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from hf_stable._wording import shortened

__all__ = ["read_option_file"]

MOST_BYTES = 1 << 16
MOST_ALIASES = 20
DEEPEST = 20


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a name stands once, as the standard wants it; yaml takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, unless a name stands in it twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"it gives {shortened(key.value)} twice", key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def read_option_file(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Return the options that a file holds by name.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no YAML, holds no mapping, or passes one of the limits.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is no regular file; give a YAML file of options")
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(
            f"{path} is longer than {MOST_BYTES} bytes, too long for a file of options"
        )
    try:
        text = content.decode("utf-8")
        _check_structure(path, text)
        options = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options by name, got {shortened(options)}")
    return options


def _check_structure(path: str | os.PathLike[str], text: str) -> None:
    """Raise ValueError for more aliases or deeper nesting than options have; builds nothing."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > DEEPEST or aliases > MOST_ALIASES:
            raise ValueError(
                f"{path} is nested deeper than {DEEPEST} levels or has more than {MOST_ALIASES} "
                "aliases; write the options out"
            )

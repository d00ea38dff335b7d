"""The options of `hf-stable run`, from the command line and from a YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import yaml

from hf_stable._wording import nearest
from hf_stable.methods.config import MethodConfig
from hf_stable.methods.patching import METHODS
from hf_stable.monitor.options import ACTIONS

__all__ = ["RunOptions", "read_options"]


@dataclass(frozen=True)
class RunOptions:
    """What to attach to each Trainer.

    Attributes:
        patch: patch methods with their options, applied together; empty patches nothing.
        monitor: probe every so many steps; None for no monitor, unless `on_collapse` is given.
        on_collapse: what the monitor does at a collapse; None for its own default.
        fold_at_end: fold the model when `Trainer.train` returns.
    """

    patch: tuple[MethodConfig, ...] = ()
    monitor: int | None = None
    on_collapse: str | None = None
    fold_at_end: bool = False

    @property
    def monitors(self) -> bool:
        """Say whether a StabilityCallback is wanted."""
        return self.monitor is not None or self.on_collapse is not None


@dataclass(frozen=True)
class _Given:
    """The value of an option, and what to call it in an error."""

    value: Any
    origin: str


def read_options(
    given: Mapping[str, Any], config: str | os.PathLike[str] | None = None
) -> RunOptions:
    """Check the launcher's options, together with the file that `--config` names.

    Args:
        given: options of the command line by name; None for one that is not given.
        config: a YAML file with further ones, which give way to the command line.

    Raises:
        ValueError, TypeError: for an option out of range, naming where it was given.
        OSError: if a file cannot be read.
    """
    options = {} if config is None else _read_config(config)
    for name, value in given.items():
        if value is not None:
            options[name] = _Given(value, f"--{name.replace('_', '-')}")
    return RunOptions(
        patch=_method_configs(_method_names(options.get("patch")), options.get("patch_config")),
        monitor=_checked_monitor(options.get("monitor")),
        on_collapse=_checked_action(options.get("on_collapse")),
        fold_at_end=_checked_flag(options.get("fold_at_end")),
    )


def _read_config(path: str | os.PathLike[str]) -> dict[str, _Given]:
    """Return the options that a file holds; null stands for an option that is not there."""
    allowed = [each.name for each in fields(RunOptions)] + ["patch_config"]
    options = {}
    for key, value in _read_yaml(path).items():
        name = str(key).replace("-", "_")
        if name not in allowed:
            raise ValueError(
                f"unknown option {name!r} in {path}{nearest(name, allowed)}; it may hold "
                f"{', '.join(allowed)}"
            )
        if value is not None:
            options[name] = _Given(value, f"{name} in {path}")
    return options


def _read_yaml(path: str | os.PathLike[str]) -> dict[Any, Any]:
    with open(path, encoding="utf-8") as file:
        try:
            content = yaml.safe_load(file)
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is not YAML ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options by name, got {content!r}")
    return content


def _method_names(given: _Given | None) -> tuple[str, ...]:
    if given is None:
        return ()
    names = given.value.split(",") if isinstance(given.value, str) else given.value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{given.origin} takes the name of a method or a list of names, got {names!r}"
        )
    names = [name.strip() for name in names]
    for name in names:
        if name not in METHODS:
            raise ValueError(
                f"unknown method {name!r} for {given.origin}{nearest(name, METHODS)}; the methods "
                f"are {', '.join(METHODS)}"
            )
        if names.count(name) > 1:
            raise ValueError(f"{given.origin} names {name!r} more than once")
    return tuple(names)


def _method_configs(methods: tuple[str, ...], given: _Given | None) -> tuple[MethodConfig, ...]:
    """Return one config per method; options are by method, or those of the only method."""
    if given is None:
        given = _Given({}, "")
    elif isinstance(given.value, str):
        given = _Given(_read_yaml(given.value), f"{given.origin} {given.value}")
    options = _as_mapping(given.value, given.origin)
    if not set(options) <= set(METHODS):
        if len(methods) != 1:
            raise ValueError(
                f"the options {', '.join(map(str, options))} of {given.origin} belong under the "
                f"name of their method: {{{methods[0] if methods else 'sigma_reparam'}: {{...}}}}"
            )
        options = {methods[0]: options}
    idle = [name for name in options if name not in methods]
    if idle:
        raise ValueError(
            f"{given.origin} has options for {idle[0]}, which --patch does not name: "
            f"{', '.join(methods) or 'it names none'}"
        )
    configs = []
    for name in methods:
        own = options.get(name)
        try:
            fields_of_it = {} if own is None else _as_mapping(own, f"{name}")
            configs.append(METHODS[name][0].from_dict(fields_of_it))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{given.origin}: {error}") from error
    return tuple(configs)


def _as_mapping(value: Any, origin: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{origin} takes options by name ({{name: value}}), got {value!r}")
    return dict(value)


def _checked_monitor(given: _Given | None) -> int | None:
    if given is None:
        return None
    text = str(given.value)
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ValueError(f"{given.origin} takes a number of steps, 1 or more, got {given.value!r}")
    return int(text)


def _checked_action(given: _Given | None) -> str | None:
    if given is None:
        return None
    if given.value not in ACTIONS:
        raise ValueError(
            f"{given.origin} takes one of {', '.join(ACTIONS)}, got {given.value!r}"
            f"{nearest(given.value, ACTIONS)}"
        )
    return given.value


def _checked_flag(given: _Given | None) -> bool:
    if given is None:
        return False
    if not isinstance(given.value, bool):
        raise ValueError(f"{given.origin} is true or false, got {given.value!r}")
    return given.value

"""The options of `hf-stable run`, from the command line and from a YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_stable._wording import nearest, shortened
from hf_stable.commands.launch.option_files import read_option_file
from hf_stable.methods.config import MethodConfig
from hf_stable.methods.patching import METHODS
from hf_stable.monitor.callback import StabilityCallback
from hf_stable.monitor.options import ACTIONS

__all__ = ["RunOptions", "read_options"]

SYNONYMS = {"monitor_every": "monitor"}
"""Other names that an option has in a file, as on the command line."""


@dataclass(frozen=True)
class RunOptions:
    """What to attach to each Trainer.

    Attributes:
        patch: patch methods with their options, applied together; empty patches nothing.
        monitor: probe every so many steps; None for no monitor, unless another of its options is
            given.
        terms: what the monitor records; this and what follows is None for the monitor's default.
        console: what it prints.
        thresholds: of its alarms, by name.
        on_collapse: what it does at a collapse.
        keep_batches: micro-batches that it writes down at an alarm.
        skip_batches: whether a run that goes back skips them.
        fold_at_end: fold the model when `Trainer.train` returns.
        register: Python files that register architectures.
    """

    patch: tuple[MethodConfig, ...] = ()
    monitor: int | None = None
    terms: str | tuple[str, ...] | None = None
    console: str | None = None
    thresholds: dict[str, float] | None = None
    on_collapse: str | None = None
    keep_batches: int | str | None = None
    skip_batches: bool | None = None
    fold_at_end: bool = False
    register: tuple[str, ...] = ()

    @property
    def monitor_options(self) -> dict[str, Any]:
        """Return what is given of the arguments of a StabilityCallback; empty for none."""
        arguments = {
            "every": self.monitor, "terms": self.terms, "console": self.console,
            "thresholds": self.thresholds, "on_collapse": self.on_collapse,
            "keep_batches": self.keep_batches, "skip_batches": self.skip_batches,
        }  # fmt: skip
        return {name: value for name, value in arguments.items() if value is not None}

    @property
    def attaches(self) -> bool:
        """Say whether there is anything to do to a Trainer."""
        return bool(self.patch or self.monitor_options or self.fold_at_end)


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
        terms=_checked("terms", _names(options.get("terms"))),
        console=_checked("console", options.get("console")),
        thresholds=_checked("thresholds", _numbers(options.get("thresholds"))),
        on_collapse=_checked_action(options.get("on_collapse")),
        keep_batches=_checked("keep_batches", _count(options.get("keep_batches"))),
        skip_batches=_checked_skip(options),
        fold_at_end=_checked_flag(options.get("fold_at_end")),
        register=_checked_files(options.get("register")),
    )


def _read_config(path: str | os.PathLike[str]) -> dict[str, _Given]:
    """Return the options that a file holds; null stands for an option that is not there."""
    allowed = [each.name for each in fields(RunOptions)] + ["patch_config", *SYNONYMS]
    options: dict[str, _Given] = {}
    for key, value in read_option_file(path).items():
        name = str(key).replace("-", "_")
        if name not in allowed:
            raise ValueError(
                f"unknown option {shortened(name)} in {path}{nearest(name, allowed)}; it may hold "
                f"{', '.join(allowed)}"
            )
        name = SYNONYMS.get(name, name)
        if name in options:
            raise ValueError(f"{path} gives {name} twice; leave one out")
        if value is not None:
            options[name] = _Given(value, f"{name} in {path}")
    return options


def _method_names(given: _Given | None) -> tuple[str, ...]:
    if given is None:
        return ()
    names = given.value.split(",") if isinstance(given.value, str) else given.value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{given.origin} takes the name of a method or a list of names, got {shortened(names)}"
        )
    names = [name.strip() for name in names]
    for name in names:
        if name not in METHODS:
            raise ValueError(
                f"unknown method {shortened(name)} for {given.origin}{nearest(name, METHODS)}; the "
                f"methods are {', '.join(METHODS)}"
            )
        if names.count(name) > 1:
            raise ValueError(f"{given.origin} names {name!r} more than once")
    return tuple(names)


def _method_configs(methods: tuple[str, ...], given: _Given | None) -> tuple[MethodConfig, ...]:
    """Return one config per method; options are by method, or those of the only method."""
    if given is None:
        given = _Given({}, "")
    elif isinstance(given.value, str):
        given = _Given(read_option_file(given.value), f"{given.origin} {given.value}")
    options = _as_mapping(given.value, given.origin)
    if not set(options) <= set(METHODS):
        if len(methods) != 1:
            raise ValueError(
                f"the options {shortened(list(options))} of {given.origin} belong under the "
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
        raise TypeError(f"{origin} takes options by name ({{name: value}}), got {shortened(value)}")
    return dict(value)


def _checked_monitor(given: _Given | None) -> int | None:
    if given is None:
        return None
    text = str(given.value)
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ValueError(
            f"{given.origin} takes a number of steps, 1 or more, got {shortened(given.value)}"
        )
    return int(text)


def _checked_action(given: _Given | None) -> str | None:
    if given is None:
        return None
    if given.value not in ACTIONS:
        raise ValueError(
            f"{given.origin} takes one of {', '.join(ACTIONS)}, got {shortened(given.value)}"
            f"{nearest(given.value, ACTIONS)}"
        )
    return given.value


def _checked_flag(given: _Given | None) -> bool:
    if given is None:
        return False
    if not isinstance(given.value, bool):
        raise ValueError(f"{given.origin} is true or false, got {shortened(given.value)}")
    return given.value


def _names(given: _Given | None) -> _Given | None:
    """Return names as a tuple, given with commas or as a list; a single word stays one."""
    if given is None:
        return None
    names = given.value.split(",") if isinstance(given.value, str) else given.value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{given.origin} takes names, got {shortened(given.value)}")
    names = tuple(name.strip() for name in names)
    return _Given(names[0] if names in (("all",), ("default",)) else names, given.origin)


def _numbers(given: _Given | None) -> _Given | None:
    """Return numbers by name, given as name=value with commas or as a mapping."""
    if given is None or not isinstance(given.value, str):
        return given
    pairs = [entry.partition("=") for entry in given.value.split(",")]
    try:
        return _Given({name.strip(): float(value) for name, _, value in pairs}, given.origin)
    except ValueError as error:
        raise ValueError(
            f"{given.origin} takes NAME=NUMBER, several with commas, got {shortened(given.value)}"
        ) from error


def _count(given: _Given | None) -> _Given | None:
    """Return digits as the number that they are, and anything else as it is."""
    if given is None or not isinstance(given.value, str) or not given.value.isdecimal():
        return given
    return _Given(int(given.value), given.origin)


def _checked_skip(options: Mapping[str, _Given]) -> bool | None:
    given, action = options.get("skip_batches"), options.get("on_collapse")
    if given is None:
        return None
    return _checked("skip_batches", given, on_collapse=action.value if action else "warn")


def _checked(name: str, given: _Given | None, **others: Any) -> Any:
    """Return an argument of StabilityCallback, which says what is allowed beside others."""
    if given is None:
        return None
    try:
        StabilityCallback(**{name: given.value}, **others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{given.origin}: {error}") from error
    return given.value


def _checked_files(given: _Given | None) -> tuple[str, ...]:
    if given is None:
        return ()
    files = given.value if isinstance(given.value, list | tuple) else [given.value]
    if not all(isinstance(file, str) for file in files):
        raise TypeError(f"{given.origin} takes Python files, got {shortened(given.value)}")
    return tuple(files)

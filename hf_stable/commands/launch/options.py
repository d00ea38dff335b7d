"""The options of `hf-stable run`, from the command line and from a YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from hf_stable._wording import nearest
from hf_stable.methods.config import MethodConfig
from hf_stable.methods.patching import METHODS

__all__ = ["RunOptions", "make_parser", "read_options", "split_command_line"]

ACTIONS = ("warn", "stop", "checkpoint", "rollback")
VALUE_OPTIONS = (
    "--patch", "--patch-config", "--monitor-every", "--monitor", "--on-collapse", "--config",
)  # fmt: skip
USAGE = "hf-stable run [options] (script.py | -m package.module) ARGS..."
EXAMPLE = """\
examples:
  hf-stable run --patch sigma_reparam --monitor 50 train.py --optim adamw2 --warmup_steps 0
  torchrun --nproc-per-node 8 -m hf_stable.run --patch sigma_reparam --monitor-every 50 train.py

Options stand before the script's name; everything after it is the script's own. Under torchrun
write --monitor-every: it takes --monitor for a short form of its own --monitor-interval. A --config
file holds any of the options by name (patch, patch_config, monitor, on_collapse, fold_at_end); the
command line goes before it. transformers is imported before the script starts, so variables that
it reads then (HF_HOME, ...) have to be set in the shell, not in the script."""


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


def read_options(argv: Sequence[str]) -> RunOptions:
    """Parse the launcher's options, together with the file that `--config` names.

    A usage error ends the process with code 2 and one line on stderr.
    """
    parser = make_parser()
    flags = vars(parser.parse_args(argv))
    try:
        given = _read_config(flags.pop("config")) if "config" in flags else {}
        for name, value in flags.items():
            given[name] = _Given(value, f"--{name.replace('_', '-')}")
        methods = _method_names(given.get("patch"))
        return RunOptions(
            patch=_method_configs(methods, given.get("patch_config")),
            monitor=_checked_monitor(given.get("monitor")),
            on_collapse=_checked_action(given.get("on_collapse")),
            fold_at_end=_checked_flag(given.get("fold_at_end")),
        )
    except (OSError, TypeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


def split_command_line(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line where the script begins: the launcher's options, the script's part.

    By hand, because argument parsers take a "--" or an option of the script for their own.
    """
    position = 0
    while position < len(argv) and argv[position] != "-m" and argv[position].startswith("-"):
        position += 2 if argv[position] in VALUE_OPTIONS else 1
    return list(argv[:position]), list(argv[position:])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the launcher's own options."""
    parser = argparse.ArgumentParser(
        prog="hf-stable run",
        usage=USAGE,
        description="Run a training script with hf_stable attached to every Trainer it builds.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--patch", metavar="METHODS", help=f"of {', '.join(METHODS)}; several with commas"
    )
    parser.add_argument(
        "--patch-config",
        metavar="FILE",
        help="YAML: the method's options by name, or several methods with their options",
    )
    parser.add_argument(
        "--monitor-every",
        "--monitor",
        dest="monitor",
        metavar="N",
        help="probe stability every N steps",
    )
    parser.add_argument("--on-collapse", metavar="ACTION", help=f"one of {', '.join(ACTIONS)}")
    parser.add_argument(
        "--fold-at-end", action="store_true", help="fold the model when Trainer.train returns"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML: all of these")
    return parser


def _read_config(path: str) -> dict[str, _Given]:
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


def _read_yaml(path: str) -> dict[Any, Any]:
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

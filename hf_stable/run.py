"""Run a training script as it is, with hf_stable attached to every Trainer that it builds.

`hf-stable run [options] script.py ARGS...`, also as `python -m hf_stable.run` and so under
`torchrun -m hf_stable.run` and `accelerate launch -m hf_stable.run`. Nothing here knows how a
model is patched or watched; this reads options, attaches and gets out of the script's way.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import importlib
import io
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import ModuleType, TracebackType
from typing import Any
from weakref import WeakSet

import yaml
from torch import nn
from transformers import Trainer

from hf_stable.describing import describe
from hf_stable.method_config import MethodConfig, nearest
from hf_stable.patching import METHODS, fold, patch

__all__ = ["RunOptions", "attach", "main", "read_options"]

ACTIONS = ("warn", "stop", "checkpoint", "rollback")
VALUE_OPTIONS = ("--patch", "--patch-config", "--monitor", "--on-collapse", "--config")
USAGE = "hf-stable run [options] (script.py | -m package.module) ARGS..."
EXAMPLE = """\
example:
  hf-stable run --patch sigma_reparam --monitor 50 train.py --optim adamw2 --warmup_steps 0

Options stand before the script's name; everything after it is the script's own. A --config file
holds any of the options by name (patch, patch_config, monitor, on_collapse, fold_at_end); the
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


def main(argv: Sequence[str] | None = None) -> None:
    """Attach hf_stable and run the script that the command line names, as `__main__`.

    Exceptions, Ctrl-C and exit codes of the script pass through. A usage error ends with code 2.

    Args:
        argv: options, the script's name, the script's own arguments; by default this process's.
    """
    ours, command = _split(sys.argv[1:] if argv is None else argv)
    options = read_options(ours)
    if not command or command == ["-m"]:
        _parser().error("no script given")
    if command[0] != "-m" and not os.path.isfile(command[0]):
        _parser().error(f"can't open {command[0]!r}: no such file")
    attachment = attach(options)
    _show_the_scripts_trace_only()
    try:
        _execute(command)
    except SystemExit as end:
        if end.code in (None, 0):
            attachment.conclude(command)
        raise
    attachment.conclude(command)


def read_options(argv: Sequence[str]) -> RunOptions:
    """Parse the launcher's options, together with the file that `--config` names.

    A usage error ends the process with code 2 and one line on stderr.
    """
    parser = _parser()
    given = vars(parser.parse_args(argv))
    try:
        if "config" in given:
            given = _read_config(given.pop("config")) | given
        methods = given.get("patch", ())
        if isinstance(methods, str):
            methods = [name.strip() for name in methods.split(",")]
        return RunOptions(
            patch=_method_configs(tuple(methods), given.get("patch_config", {})),
            monitor=_checked_monitor(given.get("monitor")),
            on_collapse=_checked_action(given.get("on_collapse")),
            fold_at_end=_checked_flag(given.get("fold_at_end", False)),
        )
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        parser.error(" ".join(str(error).split()))


def attach(options: RunOptions) -> Attachment:
    """Attach to every Trainer that this process builds from now on.

    A Trainer, or a subclass of it, comes out of its constructor with its model patched and the
    monitor among its callbacks; no optimizer exists at that moment. Models that `model_init`
    makes later are patched as they are made.
    """
    attachment = Attachment(options)
    build, train = Trainer.__init__, Trainer.train

    @functools.wraps(build)
    def build_and_attach(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        build(trainer, *args, **kwargs)
        attachment.add(trainer)

    @functools.wraps(train)
    def train_and_fold(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if trainer in attachment.training:
            return train(trainer, *args, **kwargs)  # a rollback re-enters; the outer call folds
        attachment.refuse_folded(trainer)
        attachment.training.add(trainer)
        try:
            result = train(trainer, *args, **kwargs)
        finally:
            attachment.training.discard(trainer)
        attachment.fold(trainer)
        return result

    Trainer.__init__ = build_and_attach
    if options.fold_at_end:
        Trainer.train = train_and_fold
    return attachment


@dataclass
class Attachment:
    """What the launcher does to each Trainer, and what it has done so far."""

    options: RunOptions
    num_trainers: int = 0
    training: WeakSet[Trainer] = field(default_factory=WeakSet)
    folded: WeakSet[nn.Module] = field(default_factory=WeakSet)

    def add(self, trainer: Trainer) -> None:
        """Patch the model of a new Trainer and add the monitor.

        Raises:
            RuntimeError: if the script handed its own optimizer to the Trainer.
        """
        self.num_trainers += 1
        if self.options.patch:
            if trainer.optimizer is not None:
                raise RuntimeError(
                    "hf-stable run cannot patch a model whose optimizer exists already: gamma "
                    "would not be in it. Let the Trainer build the optimizer (optim=..., "
                    "optimizer_cls_and_kwargs=...), or call hf_stable.patch in the script, before "
                    "the optimizer is built"
                )
            self._patch(trainer.model)
            if trainer.model_init is not None:
                trainer.model_init = self._patching(trainer.model_init)
        if self.options.monitors:
            trainer.add_callback(self._monitor())

    def fold(self, trainer: Trainer) -> None:
        """Fold the trained model in place."""
        fold(trainer.model)
        self.folded.add(trainer.model)
        _say(f"folded {type(trainer.model).__name__}")

    def refuse_folded(self, trainer: Trainer) -> None:
        """Raise if a model that was folded after its training is to be trained on."""
        if trainer.model_init is None and trainer.model in self.folded:
            raise RuntimeError(
                "--fold-at-end folded this model when its first Trainer.train ended, so training "
                "it again would train a plain model. Leave --fold-at-end out: every folder that "
                "the Trainer saves holds folded weights all the same"
            )

    def conclude(self, command: Sequence[str]) -> None:
        """Say so if the script never built a Trainer although something was to be attached."""
        wanted = self.options.patch or self.options.monitors or self.options.fold_at_end
        if wanted and not self.num_trainers:
            _say(
                f"nothing was patched or watched: {' '.join(command[:2])} built no transformers "
                "Trainer. In a loop of your own call hf_stable.patch(model, ...) before the "
                "optimizer is built"
            )

    def _patch(self, model: nn.Module) -> None:
        patch(model, self.options.patch)
        report = describe(model)
        names = ", ".join(config.method for config in self.options.patch)
        removed = f", {len(report.removed_norms)} norms removed" * bool(report.removed_norms)
        done = f"{report.num_patched} of {len(report.layers)} layers{removed}"
        _say(f"{names} on {report.model}: {done}")

    def _patching(self, model_init: Any) -> Any:
        @functools.wraps(model_init)  # the Trainer counts its arguments
        def init_and_patch(*args: Any) -> nn.Module:
            model = model_init(*args)
            self._patch(model)
            return model

        return init_and_patch

    def _monitor(self) -> Any:
        callback_class = importlib.import_module("hf_stable.callback").StabilityCallback
        options = {"every": self.options.monitor, "on_collapse": self.options.on_collapse}
        given = {name: value for name, value in options.items() if value is not None}
        _say(f"StabilityCallback({', '.join(f'{k}={v!r}' for k, v in given.items())}) added")
        return callback_class(**given)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line where the script begins: the launcher's options, the script's part.

    By hand, because argument parsers take a "--" or an option of the script for their own.
    """
    position = 0
    while position < len(argv) and argv[position] != "-m" and argv[position].startswith("-"):
        position += 2 if argv[position] in VALUE_OPTIONS else 1
    return list(argv[:position]), list(argv[position:])


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--monitor", metavar="N", help="probe stability every N steps")
    parser.add_argument("--on-collapse", metavar="ACTION", help=f"one of {', '.join(ACTIONS)}")
    parser.add_argument(
        "--fold-at-end", action="store_true", help="fold the model when Trainer.train returns"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML: all of these")
    return parser


def _read_config(path: str) -> dict[str, Any]:
    allowed = [each.name for each in fields(RunOptions)] + ["patch_config"]
    content = _read_yaml(path)
    options = {str(name).replace("-", "_"): value for name, value in content.items()}
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"unknown option {name!r} in {path}{nearest(name, allowed)}; it may hold "
                f"{', '.join(allowed)}"
            )
    return options


def _read_yaml(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options by name, got {content!r}")
    return content


def _method_configs(
    methods: tuple[str, ...], options: str | Mapping[str, Any]
) -> tuple[MethodConfig, ...]:
    """Return one config per method; options are by method, or those of the only method."""
    for name in methods:
        if name not in METHODS:
            raise ValueError(
                f"unknown method {name!r}{nearest(name, METHODS)}; the methods are "
                f"{', '.join(METHODS)}"
            )
    if isinstance(options, str):
        options = _read_yaml(options)
    if not set(options) <= set(METHODS):
        if len(methods) != 1:
            raise ValueError(
                f"the patch options {', '.join(map(str, options))} belong under the name of their "
                f"method: {{{methods[0] if methods else 'sigma_reparam'}: {{...}}}}"
            )
        options = {methods[0]: options}
    idle = [name for name in options if name not in methods]
    if idle:
        raise ValueError(f"options for {idle[0]}, which --patch does not name: {methods}")
    return tuple(METHODS[name][0].from_dict(options.get(name) or {}) for name in methods)


def _checked_monitor(value: Any) -> int | None:
    if value is None:
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"--monitor takes a number of steps, 1 or more, got {value!r}")
    return int(value)


def _checked_action(value: Any) -> str | None:
    if value is not None and value not in ACTIONS:
        raise ValueError(
            f"--on-collapse takes one of {', '.join(ACTIONS)}, got {value!r}"
            f"{nearest(value, ACTIONS)}"
        )
    return value


def _checked_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"fold_at_end is true or false, got {value!r}")
    return value


def _execute(command: Sequence[str]) -> None:
    """Run a script or module as `python` itself would: argv, sys.path, `__main__`."""
    if command[0] == "-m":
        sys.argv = list(command[1:])
        _set_first_path(os.getcwd())
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        _set_first_path(os.path.dirname(os.path.realpath(command[0])))
        _run_file(os.path.abspath(command[0]))


def _run_file(path: str) -> None:
    # runpy.run_path would put the absolute path into sys.argv[0] too, and take `__main__` away
    # when the script ends, under the feet of what runs at exit.
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    script = ModuleType("__main__")
    script.__dict__.update(__file__=path, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = script
    exec(code, script.__dict__)


def _set_first_path(folder: str) -> None:
    if not sys.flags.safe_path:  # under -P there is no such entry
        sys.path[0] = folder


def _show_the_scripts_trace_only() -> None:
    """Leave the launcher's own frames, which come first, out of an uncaught exception's trace."""
    print_exception = sys.excepthook
    machinery = (__file__, runpy.run_module.__code__.co_filename)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        own = trace
        while own is not None and own.tb_frame.f_code is not _execute.__code__:
            own = own.tb_next
        script = own.tb_next if own is not None else trace
        while script is not None and script.tb_frame.f_code.co_filename in machinery:
            script = script.tb_next
        print_exception(kind, error.with_traceback(script), script)

    sys.excepthook = hook


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"hf-stable run: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

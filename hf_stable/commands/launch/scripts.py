"""Run a script, folder, zip file or module as `python` itself would, within a process that goes on.

Unlike `runpy.run_path` and `run_module`, nothing is taken away when the script ends: what runs at
exit, and what a spawned worker unpickles, finds its `__main__`.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, ModuleType, TracebackType
from typing import Any

__all__ = ["read_command", "run_script", "show_the_scripts_trace_only"]


def read_command(script: Sequence[str] | None, module: bool) -> tuple[str, ...]:
    """Return the command of a script that is there to be run.

    Args:
        script: a script, folder or module, and its arguments; None or empty if none is named.
        module: whether it is a module.

    Returns:
        `script.py ARGS...`, `folder ARGS...` or `-m package.module ARGS...`.

    Raises:
        ValueError: if no script is named, or there is no such file.
    """
    if not script:
        raise ValueError("no script given: it stands behind the options, then its own arguments")
    if module:
        return ("-m", *script)  # where it is depends on sys.path
    if not os.path.exists(script[0]):
        raise ValueError(f"can't open {script[0]!r}: no such file")
    if os.path.isdir(script[0]) and _find_main(script[0]) is None:
        raise ValueError(f"can't find '__main__' module in {script[0]!r}")
    return tuple(script)


def run_script(command: Sequence[str]) -> None:
    """Run what `read_command` has found: argv, sys.path and `__main__` are as under python.

    Raises:
        ImportError: if there is no such module.
    """
    if command[0] == "-m":
        sys.argv = list(command[1:])
        _set_first_path(os.getcwd())
        spec = _find_module(command[1])
        sys.argv[0] = spec.origin or command[1]
        _run_spec(spec)
        return
    sys.argv = list(command)
    if (main := _find_main(command[0])) is not None:
        sys.path[:1] = [os.path.abspath(command[0]), *sys.path[: sys.flags.safe_path]]
        _run_spec(main)
        return
    _set_first_path(os.path.dirname(os.path.realpath(command[0])))
    path = os.path.abspath(command[0])
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    _run_code(code, __file__=path, __cached__=None)


def show_the_scripts_trace_only() -> None:
    """Leave the launcher's own frames, which come first, out of an uncaught exception's trace."""
    print_exception = sys.excepthook
    machinery = (__file__, importlib.util.__file__)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        own = trace
        while own is not None and own.tb_frame.f_code is not run_script.__code__:
            own = own.tb_next
        script = own.tb_next if own is not None else trace
        while script is not None and script.tb_frame.f_code.co_filename in machinery:
            script = script.tb_next
        print_exception(kind, error.with_traceback(script), script)

    sys.excepthook = hook


def _find_module(name: str) -> ModuleSpec:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        name = f"{name}.__main__"
        spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"No module named {name}", name=name)
    return spec


def _find_main(path: str) -> ModuleSpec | None:
    """Find the `__main__` of a folder or zip file; a script has none."""
    return PathFinder.find_spec("__main__", [os.path.abspath(path)])


def _run_spec(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    code = loader.get_code(spec.name)
    if code is None:
        raise ImportError(f"No code object available for {spec.name}", name=spec.name)
    _run_code(
        code,
        __file__=spec.origin,
        __cached__=spec.cached,
        __loader__=loader,
        __package__=spec.parent,
        __spec__=spec,
    )


def _run_code(code: CodeType, **attributes: Any) -> None:
    script = ModuleType("__main__")
    script.__dict__.update(__builtins__=builtins, **attributes)
    sys.modules["__main__"] = script
    exec(code, script.__dict__)


def _set_first_path(folder: str) -> None:
    if not sys.flags.safe_path:  # under -P there is no such entry
        sys.path[0] = folder

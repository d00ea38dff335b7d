"""Architectures of the user's own, from Python files that register them."""

from __future__ import annotations

import contextlib
import runpy
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf_stable._wording import printable

__all__ = ["register_from"]

PATIENCE = 10.0
"""Seconds after which a file that still runs is named; imports of a slow disk take some."""


def register_from(files: Iterable[str]) -> None:
    """Run Python files that call `hf_stable.register_architecture`.

    What they print goes to stderr, since stdout has the results of a command.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if one fails, or does not call `register_architecture`.
    """
    for file in files:
        _register_from(file)


def _register_from(file: str) -> None:
    from hf_stable.architectures.registry import registered_entries

    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--register {file}: no such file")
    if "register_architecture" not in path.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"--register {file}: it registers nothing; it has to call "
            "hf_stable.register_architecture(hf_stable.Architecture(...))"
        )
    known = set(map(id, registered_entries()))
    try:
        with _naming_if_slow(file), contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(file, run_name="hf_stable_register")
    except SystemExit as end:
        raise ValueError(
            f"--register {file} ended the program (exit code {end.code}): a file that registers "
            "has to run to its end"
        ) from end
    except Exception as error:  # whatever somebody's file raises
        raise ValueError(f"--register {file} failed: {type(error).__name__}: {error}") from error
    if known.issuperset(map(id, registered_entries())):
        raise ValueError(
            f"--register {file}: it ran and registered nothing; its call of "
            'register_architecture has to be reached without __name__ == "__main__"'
        )


@contextlib.contextmanager
def _naming_if_slow(file: str) -> Iterator[None]:
    """Say on stderr which file it is that a command waits for; it is not ended for that."""

    def name_it() -> None:
        said = (
            f"--register {file} has been running for {PATIENCE:g} s, and this command waits for "
            "its end (Ctrl-C ends both): it has to register and end, not to build or train a model"
        )
        print(printable(said), file=sys.stderr, flush=True)

    timer = threading.Timer(PATIENCE, name_it)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

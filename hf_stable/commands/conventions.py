"""What commands share: exit codes, options, how errors and examples look."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hf_stable._wording import printable

__all__ = [
    "BAD_INPUT",
    "BROKEN_PIPE",
    "CRASH",
    "INTERRUPTED",
    "NO",
    "SUCCESS",
    "Debug",
    "Json",
    "Module",
    "Register",
    "Script",
    "Wide",
    "complain",
    "examples",
]

SUCCESS, NO, BAD_INPUT, CRASH, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141

Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Register = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE.py", help="Python that calls hf_stable.register_architecture; repeatable."
    ),
]
Wide = Annotated[
    bool, typer.Option("--wide", help="Print tables whole, however wide the terminal is.")
]
Script = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SCRIPT ARGS",
        help="Script, folder or zip file, or after -m a module; then its own arguments.",
    ),
]
Module = Annotated[bool, typer.Option("-m", help="What follows is a module, as in python.")]


def examples(*lines: str) -> str:
    """Return the end of a command's help: command lines that can be copied."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\b\n" + "\n  ".join((title, *lines))  # \b keeps click from joining the lines


def complain(message: str) -> None:
    """Print an error as one line on stderr, with what a terminal would obey spelled out."""
    print(f"hf-stable: error: {printable(' '.join(message.split()))}", file=sys.stderr)

"""What all commands share: exit codes, the options --json and --debug, examples in their help."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "BAD_INPUT",
    "BROKEN_PIPE",
    "CRASH",
    "INTERRUPTED",
    "NO",
    "SUCCESS",
    "Debug",
    "Json",
    "examples",
]

SUCCESS, NO, BAD_INPUT, CRASH, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141

Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def examples(*lines: str) -> str:
    """Return the end of a command's help: command lines that can be copied."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\b\n" + "\n  ".join((title, *lines))  # \b keeps click from joining the lines

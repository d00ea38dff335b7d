"""How results look: tables on a terminal, plain text without colour or wrapping in a pipe, JSON."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from hf_stable._json import to_json
from hf_stable._wording import printable
from hf_stable.commands.tables import FittingTable

__all__ = [
    "indented",
    "make_console",
    "make_table",
    "print_json",
    "print_lines",
    "show_progress",
    "tell_waiting",
]


class _PlainConsole(Console):
    """Prints text as it is, with what a terminal would obey spelled out."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def make_console(*, stderr: bool = False, wide: bool = False) -> Console:
    """Return a console on stdout or stderr that takes text as it is.

    Args:
        stderr: whether it prints there.
        wide: whether it takes a terminal for as wide as it is asked to print.
    """
    # A pipe has no width: nothing is wrapped or cut there.
    file = sys.stderr if stderr else sys.stdout
    width = None if file.isatty() and not wide else 100_000
    return _PlainConsole(file=file, width=width, markup=False, emoji=False, highlight=False)


def make_table(*columns: str, least: Sequence[str] = ()) -> Table:
    """Return a table with lines on a terminal and with spaces elsewhere.

    Args:
        *columns: their headings; the first one names the rows.
        least: columns that a narrow terminal does without, the least important first.
    """
    lines = box.HEAVY_HEAD if sys.stdout.isatty() else None
    table = FittingTable(box=lines, pad_edge=lines is not None)
    table.least = least
    for column in columns:
        table.add_column(column)
    return table


def print_lines(*lines: str) -> None:
    """Print lines on stdout, never wrapped, with what a terminal would obey spelled out."""
    for line in lines:
        print(printable(line))


def indented(sentences: Sequence[str]) -> list[Padding]:
    """Return sentences that are printed indented, also where a terminal wraps them."""
    return [Padding.indent(sentence, 2) for sentence in sentences]


def print_json(content: dict[str, Any]) -> None:
    """Print plain data for a machine; NaN and infinity as null, which JSON has no numbers for."""
    print(to_json(content, indent=2))


def tell_waiting(lacking: str) -> None:
    """Say on stderr what a command waits for that goes on by itself once it is there."""
    print(printable(f"Waiting: {lacking} yet (Ctrl-C ends this)"), file=sys.stderr, flush=True)


@contextlib.contextmanager
def show_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal's stderr; what is yielded moves it, called with (done, total)."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

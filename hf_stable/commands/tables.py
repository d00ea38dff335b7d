"""Tables that keep what tells their rows apart, however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table

__all__ = ["FittingTable", "shorten_names"]

NARROWEST_NAME = 20
"""Columns that a name keeps before other columns are left out for it."""

BORDERS = 3
"""Columns that a table's lines and spaces take beside each cell."""


class FittingTable(Table):
    """A table whose first column names its rows.

    Where it is wider than the terminal, columns are left out in the order of `least`, then from the
    right, until the names have room; then names are shortened in the middle, as far as they stay
    different. Below the table stands what was left out.
    """

    least: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the table as it fits."""
        left_out = self._columns_to_leave_out(options.max_width)
        kept = [column for column in self.columns if str(column.header) not in left_out]
        if self.box is None or self._width(kept) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        names = [str(cell) for cell in kept[0].cells]
        room = options.max_width - 1 - BORDERS - sum(_least_width(c) + BORDERS for c in kept[1:])
        room = max(room, NARROWEST_NAME)
        shown = shorten_names(names, room)
        fitting = Table(box=self.box, pad_edge=self.pad_edge)
        longest = max(map(cell_len, [str(kept[0].header), *shown]))
        fitting.add_column(kept[0].header, width=min(longest, room), overflow="fold")
        for column in kept[1:]:
            fitting.add_column(column.header, justify=column.justify, overflow="fold")
        rows = zip(shown, *(list(column.cells) for column in kept[1:]), strict=True)
        for row, cells in zip(self.rows, rows, strict=True):
            fitting.add_row(*cells, end_section=row.end_section)
        yield fitting
        if left_out or shown != names:
            what = f"left out: {', '.join(left_out)}; " if left_out else "names are shortened; "
            yield f"({what}--wide shows all)"

    def _columns_to_leave_out(self, width: int) -> list[str]:
        kept, left_out = list(self.columns), []
        others = [str(column.header) for column in self.columns[1:]]
        order = [*self.least, *(name for name in reversed(others) if name not in self.least)]
        natural = max(map(cell_len, map(str, kept[0].cells)), default=0)
        name = min(natural, NARROWEST_NAME)
        for header in order:
            needed = 1 + name + BORDERS + sum(_least_width(c) + BORDERS for c in kept[1:])
            if needed <= width or len(kept) <= 2:
                break
            if header in others:
                kept = [column for column in kept if str(column.header) != header]
                left_out.append(header)
        return left_out

    def _width(self, kept: Sequence[Column]) -> int:
        if len(kept) < len(self.columns):
            return 1 << 20
        return 1 + sum(max(map(cell_len, _texts(c)), default=0) + BORDERS for c in self.columns)


def shorten_names(names: Sequence[str], width: int) -> list[str]:
    """Cut names in the middle so that they fit and stay different; whole where they would not.

    Where dots part a name, words in its middle are cut to a letter first: numbers and the ends are
    what tells layers apart.
    """
    different = len(set(names))
    for shown in (_cut_words(names, width), *_cuts(names, width)):
        if all(cell_len(name) <= width for name in shown) and len(set(shown)) == different:
            return shown
    return list(names)


def _cuts(names: Sequence[str], width: int) -> Iterator[list[str]]:
    """Yield the names with their middle cut out, at each of the places that may be it."""
    room = width - 1
    for head in sorted(range(room + 1), key=lambda head: abs(head - room // 2)):
        yield [
            name
            if len(name) <= width
            else f"{name[:head]}\N{HORIZONTAL ELLIPSIS}{name[len(name) - (room - head) :]}"
            for name in names
        ]


def _cut_words(names: Sequence[str], width: int) -> list[str]:
    shown = []
    for name in names:
        words = name.split(".")
        for index in (*range(1, len(words) - 1), 0):
            if len(".".join(words)) <= width:
                break
            if not words[index].isdigit() and len(words) > 1:
                words[index] = words[index][:1]
        shown.append(".".join(words))
    return shown


def _texts(column: Column) -> list[str]:
    return [str(column.header), *map(str, column.cells)]


def _least_width(column: Column) -> int:
    """Return the width below which a column's words would be broken."""
    return max((cell_len(word) for text in _texts(column) for word in text.split()), default=0)

"""What stands before the runs on a page that compares them by two things at once: a heat map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Cell", "Preface"]


class Cell(NamedTuple):
    """A cell of a heat map.

    Attributes:
        text: what it says: colour is never all.
        state: "trained", "warned", "failed" or "unknown", as that of a verdict.
    """

    text: str
    state: str


@dataclass(frozen=True)
class Preface:
    """A heat map with a heading, what follows from it, and what to do.

    Attributes:
        title: heading, also of the page.
        sentences: a paragraph.
        command: to be copied, or "".
        corner: what rows and columns are.
        columns: headings.
        rows: a label and a cell for each column.
    """

    title: str
    sentences: tuple[str, ...]
    command: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]

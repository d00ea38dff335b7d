"""Tables of the documents that are made from code and results; each has one source.

    python docs/tables.py    # writes them into the documents

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run from must not matter

from hf_stable.architectures import registry, supported_architectures
from hf_stable.commands.doctor.diagnosis import changes_as_markdown, list_changes
from hf_stable.monitor import terms
from recipes.evidence import lateness

ROOT = Path(__file__).resolve().parents[1]


def changes() -> list[str]:
    """Return what importing hf_stable changes, and why."""
    return changes_as_markdown(list_changes()).splitlines()


def monitored() -> list[str]:
    """Return every term of the monitor, with the names of what it logs."""
    return terms.table().splitlines()


def late() -> list[str]:
    """Return how late sigma was in training."""
    return lateness.table(json.loads(lateness.RESULTS.read_text())["rows"])


def models() -> list[str]:
    """Return every model type that an entry is shipped for, with its norms and what is left out."""
    lines = [
        "| model type | norms in front | norms behind | left out | transformers |",
        "|---|---|---|---|---|",
    ]
    for name in supported_architectures():
        entry = registry._registry[name]
        kinds = (
            any(block.pre_norms for block in entry.blocks),
            any(block.post_norms for block in entry.blocks),
        )
        norms = ("yes" if kind else "" for kind in kinds)
        left_out = "; ".join(f"`{each.path}`: {each.reason}" for each in entry.left_out)
        cells = (f"`{name}`", *norms, left_out, entry.transformers)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


TABLES: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "changes": ("docs/guides/what-importing-changes.md", changes),
    "terms": ("hf_stable/monitor/README.md", monitored),
    "models": ("docs/guides/supported-models.md", models),
    "lateness": ("hf_stable/methods/sigma_reparam/README.md", late),
}
"""Name -> the document that has the table, and what makes its lines."""


def with_table(document: str, name: str, lines: list[str]) -> str:
    """Return a document with the lines of a table in their place.

    Raises:
        LookupError: if the document has no such place.
    """
    place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)", flags=re.S)
    if not place.search(document):
        raise LookupError(f"no place for the table {name!r}")
    return place.sub(lambda found: f"{found[1]}{chr(10).join(lines)}\n{found[2]}", document)


def main() -> None:
    """Write every table into its document."""
    for name, (path, make) in TABLES.items():
        document = ROOT / path
        document.write_text(with_table(document.read_text(), name, make()))


if __name__ == "__main__":
    main()

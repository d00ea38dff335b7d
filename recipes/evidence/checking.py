"""What the checks of rules have in common: their command line, their runs, and what they write."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.evidence.runs import Variant, do_runs

__all__ = ["do_as_asked", "parser_of", "seconds_of", "write_rows"]


def parser_of(about: str | None, work: str) -> argparse.ArgumentParser:
    """Return a parser of the command line of a check.

    Args:
        about: what the check is.
        work: name of what it keeps its runs in, below `evidence-output`.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("evidence-output", work))
    return parser


def do_as_asked(
    about: str | None, work: str, variants: Iterable[Variant], seeds: Iterable[int]
) -> dict[str, list[dict[str, Any]]]:
    """Do the runs of a check that are missing, as the command line asks, a line for each.

    Args:
        about: what the check is, for `--help`.
        work: name of the folder of its runs, below `evidence-output`.
        variants: what is run.
        seeds: of each.

    Returns:
        The results by variant, one per seed.
    """
    parser = parser_of(about, work)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()

    def show(name: str, done: int, total: int) -> None:
        print(f"{done} of {total} runs, last {name}", file=sys.stderr, flush=True)

    return do_runs(variants, seeds, args.work, workers=args.workers, on_done=show)


def seconds_of(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """Return how long all runs took together."""
    return round(sum(run["seconds"] for each in found.values() for run in each))


def write_rows(path: Path, content: Mapping[str, Any], rows: Mapping[str, Sequence[Any]]) -> None:
    """Write what a check came to, a line for each row, so that differences can be read.

    Args:
        path: of the file.
        content: comes first.
        rows: by the keys that they get behind it.
    """
    text = json.dumps(content, indent=1).removesuffix("\n}")
    for key, each in rows.items():
        lines = ",\n  ".join(map(json.dumps, each))
        text += f',\n "{key}": [\n  {lines}\n ]'
    path.write_text(text + "\n}\n")

"""Tables of the documents that are made from code and results; each has one source.

    python docs/tables.py    # writes them into the documents

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run from must not matter
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from parity_rows import ASPECTS, read_rows

from hf_stable.commands.bench.cost_tables import cost_table
from hf_stable.commands.doctor.diagnosis import changes_as_markdown, list_changes
from hf_stable.monitor import terms
from hf_stable.trainer.changes import ON_IMPORT
from recipes.evidence import lateness, tau

ROOT = Path(__file__).resolve().parents[1]

CONTRACT = ROOT / "tests" / "architectures" / "contract.json"
"""Written by `python tests/support/architecture_contract.py`."""


def changes() -> list[str]:
    """Return what importing hf_stable and its commands change, and why.

    The order is fixed here: that of the list follows what was imported first.
    """
    rows = sorted(
        list_changes(),
        key=lambda row: (row.made_by != ON_IMPORT, row.made_by, row.target, row.reason),
    )
    return changes_as_markdown(rows).splitlines()


def monitored() -> list[str]:
    """Return every term of the monitor, with the names of what it logs."""
    return terms.table().splitlines()


def late() -> list[str]:
    """Return how late sigma was in training."""
    return lateness.table(json.loads(lateness.RESULTS.read_text())["rows"])


def short_runs() -> list[str]:
    """Return what short runs came to under fixed and derived values of tau."""
    return tau.table(json.loads(tau.RESULTS.read_text())["reported"])


def parity() -> list[str]:
    """Return what many processes have been shown to do as one, by engine, model and method.

    `python docs/parity.py` runs the tests that show it, and writes what passed.
    """
    shown: dict[tuple[str, str, str], set[str]] = {}
    for row in read_rows():
        place = row["engine"], row["model"], row["method"]
        shown.setdefault(place, set()).update(row["same"])
    ranks = {engine: index for index, engine in enumerate(ENGINES)}
    lines = [
        f"| engine | model | method | {' | '.join(ASPECTS)} |",
        "|---|---|---|" + "---|" * len(ASPECTS),
    ]
    for place in sorted(shown, key=lambda each: (ranks.get(each[0], len(ranks)), *each)):
        cells = ("equal" if aspect in shown[place] else "" for aspect in ASPECTS)
        lines.append(f"| {' | '.join((*place, *cells))} |")
    return lines


ENGINES = (
    "DDP", "ZeroRedundancyOptimizer", "DeepSpeed ZeRO 0", "DeepSpeed ZeRO 1", "DeepSpeed ZeRO 2",
    "DeepSpeed ZeRO 3", "DeepSpeed ZeRO 3, partitioned at loading", "FSDP2", "HSDP",
    "tensor parallel", "FSDP2 x TP",
)  # fmt: skip
"""In the order of the table; others follow by name."""


def models() -> list[str]:
    """Return what the contract of every shipped entry came to.

    The tests of the entries compare each cell with what the contract gives now.
    """
    recorded = json.loads(CONTRACT.read_text())
    columns = list(next(iter(recorded.values()))["checks"])
    lines = [f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, results in sorted(recorded.items()):
        cells = [_cell(column, results["checks"][column]) for column in columns]
        if results["left out"]:
            cells[0] = "all but some"
        needs = f" (transformers {results['transformers']})" if results["transformers"] else ""
        lines.append(f"| `{name}`{needs} | {' | '.join(cells)} |")
    return lines


def _cell(column: str, result: str) -> str:
    if column == "export":
        return f"`{result}`"
    if column == "norms":
        return ", ".join(f"`{method}`" for method in result.split(", "))
    return "" if result == "no language model" else result


def left_out() -> list[str]:
    """Return what a patch leaves as it is in each model, and why."""
    models: dict[tuple[str, str], list[str]] = {}
    for name, results in sorted(json.loads(CONTRACT.read_text()).items()):
        for matrix, reason in results["left out"].items():
            models.setdefault((matrix.rpartition(".*.")[2], reason), []).append(f"`{name}`")
    lines = ["| models | matrix | why |", "|---|---|---|"]
    return lines + [
        f"| {', '.join(names)} | `{matrix}` | {reason} |"
        for (matrix, reason), names in models.items()
    ]


def costs(name: str) -> list[str]:
    """Return what a benchmark has measured, by its file in `recipes/costs`."""
    return cost_table(json.loads((ROOT / "recipes" / "costs" / f"{name}.json").read_text()))


TABLES: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "changes": ("docs/guides/what-importing-changes.md", changes),
    "terms": ("hf_stable/monitor/README.md", monitored),
    "models": ("docs/guides/supported-models.md", models),
    "costs-of-sigma": ("hf_stable/methods/sigma_reparam/README.md", partial(costs, "sigma")),
    "costs-of-monitor": ("hf_stable/monitor/README.md", partial(costs, "monitor")),
    "costs-of-adamw2": ("hf_stable/adamw2/README.md", partial(costs, "adamw2")),
    "left-out": ("docs/guides/supported-models.md", left_out),
    "parity": ("docs/guides/many-processes.md", parity),
    "short-runs": ("hf_stable/adamw2/README.md", short_runs),
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

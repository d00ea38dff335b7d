"""Tables of the method cards, from the JSON that a benchmark has written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_stable.commands.bench.timing import TOTAL

__all__ = ["cost_table"]


def cost_table(content: Mapping[str, Any]) -> list[str]:
    """Return a line on how it was measured, and a Markdown table of the ratios to the baseline.

    Args:
        content: of the file of `hf-stable bench ... --output`.

    Returns:
        Lines. Cases that have the same subjects share a table: a row for each case, the
        milliseconds of the baseline, and a column of ratios for each other subject. Memory of
        several subjects has a table of its own.
    """
    settings, machine = content["settings"], content["machine"]
    baseline = settings["baseline"]
    cases: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in content["results"]:
        if row["phase"] == TOTAL:
            cases.setdefault(row["case"], {})[row["subject"]] = row
    tables: dict[tuple[str, ...], list[str]] = {}
    for case, rows in cases.items():
        others = tuple(subject for subject in rows if subject != baseline)
        milliseconds = rows[baseline]["milliseconds"]
        cells = [case, f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"]
        cells += [f"{rows[subject]['ratio']:.2f}" for subject in others]
        tables.setdefault(others, []).append(f"| {' | '.join(cells)} |")
    lines = [_conditions(settings, machine, content["results"])]
    for others, table in tables.items():
        heads = ("case", f"{baseline}, ms", *others)
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *table]
    return lines + _memory_table(settings.get("memory", {}))


def _memory_table(memory: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table with a row for each subject, or none where there are none."""
    rows = {subject: of for subject, of in memory.items() if isinstance(of, Mapping)}
    if not rows:
        return []
    columns = list(next(iter(rows.values())))
    heads = ("share of the parameters' bytes", *columns)
    cells = [[subject, *(f"{of[name]:.2%}" for name in columns)] for subject, of in rows.items()]
    return [
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]


def _conditions(
    settings: Mapping[str, Any], machine: Mapping[str, Any], results: list[Mapping[str, Any]]
) -> str:
    """Say in a line where and how it was measured."""
    rounds = sorted({row["rounds"] for row in results})
    counts = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else str(rounds[0])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = machine["load"]
    busy = "" if load is None else f", load {load:g}"
    return (
        f"Medians of {counts} alternated rounds, {settings['timer']}; {machine['processor']}, "
        f"{machine['cores']} cores{busy}; {versions} (`hf-stable bench {settings['benchmark']}`)."
    )

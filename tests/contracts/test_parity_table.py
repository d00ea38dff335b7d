"""The guide's table of parity is of tests that exist, and of all of them."""

from __future__ import annotations

import ast
from pathlib import Path

from parity_rows import ASPECTS, read_rows

TESTS = Path(__file__).resolve().parents[1]


def marked_tests() -> dict[str, bool]:
    """Every test by its path and name, and whether it says by a mark of its own what it shows."""
    found = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text()
        if "mark.parity" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = map(ast.unparse, node.decorator_list)
                name = f"{path.relative_to(TESTS.parent).as_posix()}::{node.name}"
                found[name] = any("mark.parity" in mark for mark in marks)
    return found


def test_every_row_is_of_a_test_and_every_marked_test_has_a_row():
    rows, tests = read_rows(), marked_tests()
    assert rows and all(set(row["same"]) <= set(ASPECTS) and row["same"] for row in rows)
    unknown = {row["test"] for row in rows} - tests.keys()
    assert not unknown, "write the table anew: python docs/parity.py FILE; python docs/tables.py"
    silent = {test for test, is_marked in tests.items() if is_marked} - {r["test"] for r in rows}
    assert not silent, f"no run of it has passed into the table: python docs/parity.py {silent}"

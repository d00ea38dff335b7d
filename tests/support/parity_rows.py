"""The parity table's source: which tests have shown that many processes do as one.

A test says by a mark what it compares with one process:

    @pytest.mark.parity(engine="FSDP2", models=("GPT-2",), method="AdamW2", same=("losses",))

Texts may name its parameters: `engine="{mode}"`. `python docs/parity.py` runs such tests, and what
passes is written to `docs/parity.json`, which `docs/tables.py` makes the table of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ASPECTS = ("losses", "vectors", "checkpoints", "resume")
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "parity.json"

Row = dict[str, Any]


def rows_of(item: Any) -> list[Row]:
    """What a test with its parameters shows, one row for each mark and model."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    found = []
    for mark in item.iter_markers("parity"):
        unknown = set(mark.kwargs["same"]) - set(ASPECTS)
        assert not unknown, f"{item.nodeid}: {unknown} is none of {ASPECTS}"
        for model in mark.kwargs["models"]:
            texts = {"engine": mark.kwargs["engine"], "model": model}
            texts["method"] = mark.kwargs["method"]
            row = {key: text.format(**params) for key, text in texts.items()}
            found.append({"test": name_of(item), **row, "same": list(mark.kwargs["same"])})
    return found


def name_of(item: Any) -> str:
    """The test without its parameters."""
    return item.nodeid.partition("[")[0]


def key_of(row: Row) -> str:
    """What a row is of; the rest is what it says."""
    return json.dumps([row[key] for key in ("test", "engine", "model", "method")])


def file_of(name: str) -> str:
    return name.partition("::")[0]


class ParityRows:
    """A pytest plugin that puts the rows of the tests that ran in place of their earlier ones."""

    def __init__(self) -> None:
        self.passed: list[Row] = []
        self.ran: set[str] = set()
        self.failed: set[str] = set()
        self.known: set[str] = set()

    def pytest_itemcollected(self, item: Any) -> None:
        self.known.add(name_of(item))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        outcome = yield
        report, rows = outcome.get_result(), rows_of(item)
        keys = set(map(key_of, rows))
        if report.when == "call":
            self.ran |= keys
            self.passed += rows
        if not report.passed:
            self.failed |= keys

    def pytest_sessionfinish(self) -> None:
        files = {file_of(name) for name in self.known}
        kept = [
            row
            for row in read_rows()
            if key_of(row) not in self.ran
            and (row["test"] in self.known or file_of(row["test"]) not in files)
        ]
        write_rows(kept + [row for row in self.passed if key_of(row) not in self.failed])


def read_rows() -> list[Row]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def write_rows(rows: list[Row]) -> None:
    unique = {json.dumps(row, sort_keys=True): row for row in rows}
    ordered = sorted(unique.values(), key=lambda row: (row["engine"], row["model"], row["test"]))
    lines = ",\n".join(f"  {json.dumps(row)}" for row in ordered)
    RESULTS.write_text(f"[\n{lines}\n]\n")

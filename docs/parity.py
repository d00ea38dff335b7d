"""Run the tests that compare many processes with one, and write what has passed to parity.json.

    python docs/parity.py tests/contracts/test_parity.py    # some files; all take many minutes

Rows of tests that did not run stay as they are; those of tests that failed go. `python
docs/tables.py` makes the table of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import pytest
from parity_rows import ParityRows

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the tests of the files that were named, or all."""
    files = sys.argv[1:] or [str(ROOT / "tests")]
    return int(pytest.main(["-q", "-m", "parity", *files], plugins=[ParityRows()]))


if __name__ == "__main__":
    sys.exit(main())

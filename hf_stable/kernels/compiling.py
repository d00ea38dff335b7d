"""Compiled code, from numba's cache or made now and announced. Imports numba: on first use only."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

from numba import cfunc
from numba.core import event

from hf_stable.kernels import entries, leading, passes, pointers, rows, settling, tables

__all__ = ["compiled"]


class _Announcement(event.Listener):
    """Says on stderr that something is compiled, once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_made = False

    def on_start(self, event: Any) -> None:
        """Print the line, the first time."""
        if not self.is_made:
            self.is_made = True
            print(
                f"hf_stable compiles a kernel ({self.name}) once for this machine, in some seconds",
                file=sys.stderr,
                flush=True,
            )

    def on_end(self, event: Any) -> None:
        """Say nothing."""


@cache
def compiled(name: str) -> Any:
    """Return a compiled function of `passes` or `leading`; its first argument is a head's address.

    It holds no lock of the interpreter. Numba keeps it in `__pycache__`, in the user's cache folder
    where that cannot be written, or where NUMBA_CACHE_DIR says; where nothing can be written, each
    process compiles anew.

    Args:
        name: `"lead_"` or `"work_"` and a dtype.

    Returns:
        What numba makes, with its `address`; the code lives as long as it does.
    """
    leads = name.startswith("lead")
    function = getattr(leading if leads else passes, name)
    numbers = "int64" if leads else "int64, int64, int64"
    # Numba's cache knows a function by its name and its own file; what it calls may change too.
    function.__qualname__ = f"{name}_{_fingerprint():08x}"
    with event.install_listener("numba:compile", _Announcement(" for ".join(name.split("_")))):
        made = cfunc(f"void({numbers})", cache=True, **entries.VECTOR)(function)
    return made


@cache
def _fingerprint() -> int:
    """Return a number that changes with the source of anything that is compiled."""
    files = (entries, leading, passes, pointers, rows, settling, tables)
    return crc32(b"".join(Path(str(each.__file__)).read_bytes() for each in files))

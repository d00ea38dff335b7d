"""Compiled code from numba's cache, or made now and announced. Imported on first use, with numba."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from numba import cfunc
from numba.core import event

from hf_stable.kernels import loops

__all__ = ["compiled"]


class _Announcement(event.Listener):
    """Says on stderr that something is compiled, once."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.is_made = False

    def on_start(self, event: Any) -> None:
        """Print the line, the first time."""
        if not self.is_made:
            self.is_made = True
            print(
                f"hf_stable: compiling its passes over {self.kind} weights for this machine, once "
                "(some seconds)",
                file=sys.stderr,
                flush=True,
            )

    def on_end(self, event: Any) -> None:
        """Say nothing."""


@cache
def compiled(name: str) -> Callable[[int], None]:
    """Return a compiled function of `loops`, which takes the address of a head.

    It holds no lock of the interpreter. Numba keeps it in `__pycache__`, in the user's cache folder
    where that cannot be written, or where NUMBA_CACHE_DIR says; where nothing can be written, each
    process compiles anew.

    Args:
        name: `"lead_"` or `"work_"` and a dtype.
    """
    with event.install_listener("numba:compile", _Announcement(name)):
        function = cfunc("void(int64)", cache=True, **loops.COMPILED)(getattr(loops, name))
    entry: Any = ctypes.CFUNCTYPE(None, ctypes.c_int64)(function.address)
    entry.function = function  # whose memory the code lies in
    return entry

"""The threads that compiled code shares its work with: torch's own.

A second pool (numba's has one) would spin against torch's each time that one hands over to the
other: thousands of microseconds where a parallel loop takes a few.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

__all__ = ["THREADS_OF_PYTHON", "address_of", "runner", "threads_are_torchs"]

_Runner = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_Worker = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def runner() -> int:
    """Return the address of a function that runs another on several threads and waits for them.

    It takes `(worker, argument, number of threads, flags)` and calls `worker(argument)` on each.
    This is GCC's OpenMP, of the very library that torch has loaded; where torch has none that
    offers it, threads of Python do the same, more slowly.
    """
    function: Any
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        function = THREADS_OF_PYTHON
    return address_of(function)


def address_of(function: Any) -> int:
    """Return the address of a foreign function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def threads_are_torchs() -> bool:
    """Say whether the threads are torch's own."""
    return runner() != address_of(THREADS_OF_PYTHON)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=256, thread_name_prefix="hf_stable")  # made as needed


os.register_at_fork(after_in_child=_pool.cache_clear)


@_Runner
def THREADS_OF_PYTHON(worker: int, argument: int, count: int, flags: int) -> None:
    """Run a compiled function on threads of Python; it holds no lock of the interpreter."""
    function = _Worker(worker)
    others = [_pool().submit(function, argument) for _ in range(count - 1)]
    function(argument)
    for other in others:
        other.result()

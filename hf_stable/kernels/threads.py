"""The threads that compiled code shares its work with: torch's own.

A second pool (numba's has one) would spin against torch's each time that one hands over to the
other: thousands of microseconds where a parallel loop takes a few.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

__all__ = ["address_of", "by_threads_of_python", "run_on_threads", "threads_are_torchs", "yielding"]

MOST_OF_PYTHON = 64
"""Threads of Python at most."""

_Worker = ctypes.CFUNCTYPE(None, ctypes.c_int64)


def run_on_threads(worker: int, argument: int, count: int) -> None:
    """Call a compiled function on several threads, and wait for them.

    There may be fewer threads than that: within a parallel region, say.

    Args:
        worker: address of a function that takes an integer. It holds no lock of the interpreter.
        argument: handed to it on each thread.
        count: of the threads, this one among them.
    """
    parallel = _parallel()
    if count == 1:
        _Worker(worker)(argument)
    elif parallel is None:
        by_threads_of_python(worker, argument, count)
    else:
        parallel(worker, argument, count, 0)


def address_of(function: Any) -> int:
    """Return the address of a foreign function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def threads_are_torchs() -> bool:
    """Say whether the threads are torch's own."""
    return _parallel() is not None


@cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """Return GCC's OpenMP, of the very library that torch has loaded, where it offers that."""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.restype = None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return function


@cache
def yielding() -> int:
    """Return the address of what lets other threads of the system run, or 0."""
    try:
        if os.name == "nt":
            return address_of(ctypes.CDLL("kernel32").SwitchToThread)
        return address_of(ctypes.CDLL(None).sched_yield)
    except (OSError, AttributeError):
        return 0


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_OF_PYTHON, thread_name_prefix="hf_stable")  # made as needed


os.register_at_fork(after_in_child=_pool.cache_clear)


def by_threads_of_python(worker: int, argument: int, count: int) -> None:
    """Do as `run_on_threads` where torch's threads cannot be had; it is slower."""
    function = _Worker(worker)
    others = [_pool().submit(function, argument) for _ in range(min(count, MOST_OF_PYTHON) - 1)]
    function(argument)
    for other in others:
        other.result()

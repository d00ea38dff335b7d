"""Faults at every point of a piece of work: out of memory in a torch call, Ctrl-C at a line."""

from __future__ import annotations

import itertools
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import hf_stable

PACKAGE = str(Path(hf_stable.__file__).parent)


class OutOfMemoryAt(TorchDispatchMode):
    """Raise torch's out-of-memory error in place of the n-th torch operation."""

    def __init__(self, point: int) -> None:
        super().__init__()
        self.left = point

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError(f"injected at {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def interrupt_at(point: int) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt at the n-th line of the package that is run.

    The list that is given gains the name of the function of each line until then.
    """
    run: list[str] = []

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            run.append(frame.f_code.co_name)
            if len(run) == point:
                raise KeyboardInterrupt(f"injected at {frame.f_code.co_name}:{frame.f_lineno}")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield run
    finally:
        sys.settrace(before)


def count_operations(work: Callable[[], Any]) -> int:
    """The number of torch operations of a piece of work."""
    with OutOfMemoryAt(0) as counter:
        work()
    return -counter.left


def list_lines(work: Callable[[], Any]) -> list[str]:
    """The function of every line of the package that a piece of work runs."""
    with interrupt_at(0) as run:
        work()
    return run


def count_lines(work: Callable[[], Any]) -> int:
    """The number of lines of the package that a piece of work runs."""
    return len(list_lines(work))


def told_where_memory_ends(path: str, at: int, rank: int, work: Callable[[], Any]) -> str:
    """What this rank is told by a piece of work of all ranks that ends on one of them.

    Args:
        path: of the function that runs out of memory, as it is imported.
        at: which call of it, from 1.
        rank: where.
        work: that every rank does.
    """
    original, calls = pkgutil.resolve_name(path), itertools.count(1)

    def out_of_memory(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise torch.OutOfMemoryError(f"injected into {path}")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(path, out_of_memory)
        with pytest.raises((torch.OutOfMemoryError, RuntimeError)) as error:
            work()
    return f"{type(error.value).__name__}: {error.value}"


def check_told(told: Sequence[str], path: str, rank: int) -> None:
    """Assert that all ranks were told of what `told_where_memory_ends` has made fail."""
    own = f"OutOfMemoryError: injected into {path}"
    for number, said in enumerate(told):
        theirs = f"RuntimeError: rank {rank} could not do its part, so that none does: {own}"
        assert said == (own if number == rank else theirs)

"""Changes of a model that happen whole or not at all.

What is about to be changed is kept first; where a change fails, for want of memory or by Ctrl-C,
everything is put back in the reverse order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["Undo", "keep_attributes", "undoing"]

Undo = list[Callable[[], object]]
"""What puts back what was changed, in the order of the changes."""


_TABLES = tuple(n for n, v in vars(nn.Module()).items() if isinstance(v, dict | set))
"""Where a module keeps its parameters, buffers, children and hooks."""


@contextmanager
def undoing() -> Iterator[Undo]:
    """Undo what the block has changed if it raises; it adds to the list before each change."""
    undo: Undo = []
    try:
        yield undo
    except BaseException:
        for put_back in reversed(undo):
            put_back()
        raise


def keep_attributes(module: nn.Module) -> Callable[[], None]:
    """Return a function that gives a module back its class and attributes of now.

    Parameters, buffers, children and hooks are put back as the objects that they are; what is
    written into their memory is not.
    """
    kept_class, attributes = type(module), dict(module.__dict__)
    tables = {name: attributes[name].copy() for name in _TABLES}

    def put_back() -> None:
        module.__class__ = kept_class
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for name, table in tables.items():
            attributes[name].clear()
            attributes[name].update(table)

    return put_back

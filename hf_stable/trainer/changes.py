"""What hf_stable changes in a process: a list that each file of this room adds its own to.

Everything passes straight through where no patched model is involved, unless its reason says
otherwise.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["ADVICE", "ON_IMPORT", "Wrap", "adding", "is_in_place", "listed", "make", "wrapping"]

ADVICE = "Install a version that hf_stable's requirements allow, or a newer hf_stable"

ON_IMPORT = "import hf_stable"
"""What makes a change that is not made by something else."""

_MARK = "_hf_stable_wraps"


@dataclass(frozen=True)
class Wrap:
    """One thing in the process that hf_stable changes.

    Attributes:
        target: `module:qualified.name` of what is wrapped or added to.
        reason: why, in one line.
        parameters: names that a function must have for its wrapper to fit.
        wrapper: called with the original function and its arguments; None where nothing is
            replaced but something added.
        is_added: where something is added, says whether it has been.
        made_by: what a user does that makes the change.
    """

    target: str
    reason: str
    parameters: tuple[str, ...] = ()
    wrapper: Callable[..., Any] | None = None
    is_added: Callable[[], bool] = lambda: False
    made_by: str = ON_IMPORT


_wraps: list[Wrap] = []


def listed() -> tuple[Wrap, ...]:
    """Return the list, as far as the files that add to it have been imported."""
    return tuple(_wraps)


def adding(
    target: str, *, reason: str, is_added: Callable[[], bool], made_by: str = ON_IMPORT
) -> None:
    """Put something on the list that is added to what is there; who adds it sees to that."""
    _wraps.append(Wrap(target, reason, is_added=is_added, made_by=made_by))


def wrapping(
    target: str, *parameters: str, reason: str, made_by: str = ON_IMPORT
) -> Callable[[Any], Any]:
    """Put the decorated function on the list, as the wrapper of a target.

    Args:
        target: as in `Wrap`.
        *parameters: as in `Wrap`.
        reason: as in `Wrap`.
        made_by: as in `Wrap`.
    """

    def note(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        _wraps.append(Wrap(target, reason, parameters, wrapper, made_by=made_by))
        return wrapper

    return note


def make(made_by: str = ON_IMPORT) -> None:
    """Put every wrapper of one maker in place, once; later calls change nothing.

    Raises:
        ImportError: if a name on the list is not there or has other parameters, naming the
            version. Nothing has been changed then.
    """
    wanted = [wrap for wrap in _wraps if wrap.made_by == made_by and wrap.wrapper]
    found = [(wrap, _resolve(wrap)) for wrap in wanted if _is_loaded(wrap)]
    for wrap, original in found:
        if wrap not in _wraps_around(original):
            _replace(wrap)


def is_in_place(wrap: Wrap) -> bool:
    """Say whether a change on the list has been made in this process, and still stands."""
    if wrap.wrapper is None:
        return wrap.is_added()
    return _is_loaded(wrap) and wrap in _wraps_around(pkgutil.resolve_name(wrap.target))


def _wraps_around(function: Any) -> tuple[Wrap, ...]:
    return getattr(function, _MARK, ())


def _is_loaded(wrap: Wrap) -> bool:
    # The Trainer imports PEFT where it is installed, so what is not here now will not come.
    return wrap.target.partition(".")[0] in sys.modules


def _resolve(wrap: Wrap) -> Any:
    try:
        original = pkgutil.resolve_name(wrap.target)
        missing = set(wrap.parameters) - set(inspect.signature(original).parameters)
        if missing:
            raise AttributeError(f"it has no parameter {sorted(missing)[0]!r}")
    except (ImportError, AttributeError) as error:
        package = wrap.target.partition(".")[0]
        raise ImportError(
            f"hf_stable does not fit {package} {sys.modules[package].__version__}: "
            f"{wrap.target} is not what it was ({error}). {ADVICE}"
        ) from error
    return original


def _replace(wrap: Wrap) -> None:
    function, original = wrap.wrapper, pkgutil.resolve_name(wrap.target)
    assert function is not None
    original = getattr(original, "__func__", original)  # of a class method, which is bound

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    setattr(wrapper, _MARK, (*_wraps_around(original), wrap))
    path, _, name = wrap.target.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(path)
    is_of_class = isinstance(inspect.getattr_static(owner, name), classmethod)
    setattr(owner, name, classmethod(wrapper) if is_of_class else wrapper)

"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

__all__ = ["is_unfinished", "unfinished", "write_whole"]


@contextlib.contextmanager
def unfinished(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty file to write to, which takes the name of a path once it is finished.

    Until then it has a name beside it that nobody can guess, so that two writers do not trip each
    other, and that follows no link. What was there before stays if anything fails.

    Raises:
        OSError: if the file cannot be made, or cannot take the name.
    """
    path = Path(path)
    # With a long name before it, the temporary one would be longer than file systems allow.
    partial = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.tmp")
    # O_EXCL: a file or a link of that name is never opened. The mode is the user's own umask's.
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            # A disk that is full is said without the name of what it is too full for.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def is_unfinished(name: str, final: str) -> bool:
    """Say whether a file's name is one that `unfinished` gives: of a process that was killed."""
    return bool(re.fullmatch(rf"\.{re.escape(final[:64])}\.[0-9a-f]{{16}}\.tmp", name))


@contextlib.contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Open a text file in UTF-8 that takes its name only once it is finished; see `unfinished`.

    Args:
        path: of the file; its folder is created if it is not there.

    Raises:
        IsADirectoryError: if the path is a folder.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        yield file

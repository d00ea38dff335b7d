"""One training at a time writes into an output folder."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from weakref import WeakValueDictionary

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["FILE_NAME", "FolderLock", "is_held"]

FILE_NAME = "_stability.lock"
"""The Trainer pushes nothing that begins with "_"."""

ATTEMPTS = 3
"""The file may be removed by its last owner just as it is opened, or looked at by `is_held`."""

PAUSE = 0.01
"""Seconds before another attempt; a look takes far less."""

# A process is never refused a lock that it holds already: this is how it knows.
_held: WeakValueDictionary[Path, FolderLock] = WeakValueDictionary()


class FolderLock:
    """Says that a training writes into a folder, until it ends or its process does, however.

    Worker processes do not inherit it. Where a file system has no locks, or the folder cannot be
    written, nobody is refused.

    Args:
        folder: that must exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Hold nothing yet."""
        self._path = Path(folder).resolve() / FILE_NAME
        self._descriptor: int | None = None

    def acquire(self) -> str | None:
        """Take the lock; return who holds it instead, or None if it is taken."""
        if fcntl is None:
            return None
        if _held.get(self._path, self) is not self:
            return "another Trainer of this process"
        for attempt in range(ATTEMPTS):
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                descriptor = os.open(self._path, flags, 0o666)
            except OSError:
                return None
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if attempt < ATTEMPTS - 1:
                    os.close(descriptor)
                    time.sleep(PAUSE)
                    continue
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                return holder or "another process"
            except OSError:
                os.close(descriptor)
                return None
            if self._is_still_there(descriptor):
                self._take(descriptor)
                return None
            os.close(descriptor)
        return None

    def release(self) -> None:
        """Let others write there; nothing happens where the lock is not held."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            os.unlink(self._path)
        os.close(self._descriptor)
        self._descriptor = None
        _held.pop(self._path, None)

    def _take(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _held[self._path] = self
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
        with suppress(OSError):  # a disk that is full
            os.truncate(descriptor, 0)
            os.write(descriptor, text.encode())

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def is_held(folder: str | os.PathLike[str]) -> bool:
    """Say whether a training writes into a folder now, as far as locks tell."""
    path = Path(folder).resolve() / FILE_NAME
    if path in _held:  # to open and close the file here would end this process's own lock
        return True
    if fcntl is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False

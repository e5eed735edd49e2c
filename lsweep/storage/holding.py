"""Holding: who works on a plan holds its file, so that nobody replaces it under them.

A lock of the operating system: death lets go of it. Where a file system has none, nobody can be
known to be gone, and nothing is replaced.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix: nobody holds, nobody replaces
    fcntl = None  # type: ignore[assignment]

PATIENCE = 5.0  # seconds; who holds alone removes a few files
POLL = 0.01


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a file together with others; one that is not there, or cannot be locked, is not held.

    >>> with held(Path("nowhere")):
    ...     pass
    """
    end = time.monotonic() + PATIENCE
    fd = _lock(path, alone=False)
    while fd is None and path.exists() and time.monotonic() < end:
        time.sleep(POLL)
        fd = _lock(path, alone=False)
    try:
        yield
    finally:
        if fd is not None and fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Hold a file against all others; yields whether nobody else held it.

    >>> with alone(Path("nowhere")) as mine:
    ...     mine
    False
    """
    fd = _lock(path, alone=True)
    try:
        yield fd is not None and fd >= 0
    finally:
        if fd is not None and fd >= 0:
            os.close(fd)


def _lock(path: Path, *, alone: bool) -> int | None:
    """Return the locked file, None where another has it or it is gone, -1 without locks."""
    if fcntl is None:
        return -1
    try:
        fd = os.open(path, (os.O_RDWR if alone else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError:
        return None if not path.exists() else -1
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.stat()):
            return fd
        found = None  # it was replaced since it was opened
    except (BlockingIOError, FileNotFoundError):
        found = None
    except OSError:
        found = -1
    os.close(fd)
    return found

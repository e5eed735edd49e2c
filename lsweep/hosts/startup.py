"""Start-up: many workers that begin together do not ask the file system for everything at once.

On a node the first to come loads alone, from the disk; the others follow together, from the page
cache. Over many nodes starts are spread by chance.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lsweep.hosts.machine import short_hash, start_time

try:
    import fcntl
except ImportError:  # not a Unix: nobody waits
    fcntl = None  # type: ignore[assignment]

CROWD = 64  # so many may begin at once
LONGEST_DELAY = 10.0  # seconds
PATIENCE = 120.0  # seconds; a holder that hangs delays nobody for longer
POLL = 0.05
# Asked at once: when a launch is being ended, the parent of those that are left is another one.
PARENT = os.getppid()
START_OF_PARENT = start_time(PARENT)


def delay(of: int, chance: random.Random | None = None) -> float:
    """Return how many seconds one of ``of`` workers waits before it begins.

    >>> delay(64), 0 <= delay(500) <= 5, 0 <= delay(10**6) <= 10
    (0.0, True, True)
    """
    if of <= CROWD:
        return 0.0
    return (chance or random.SystemRandom()).uniform(0, min(of / 100, LONGEST_DELAY))


@contextlib.contextmanager
def turn(what: str, patience: float = PATIENCE) -> Iterator[bool]:
    """Load ``what`` in turn: alone as the first on this node, together with all others after it.

    The lock is on a file in the node's temporary folder and freed by death; where that cannot be
    had, or its holder takes too long, everybody just loads. Yields whether this is the first.

    Args:
        what: the same for all that load the same, such as a plan's digest.
        patience: seconds to wait at most.

    >>> with turn("a digest"):
    ...     pass
    """
    path = node_local(what, "lock")
    if fcntl is None:
        yield False
        return
    try:
        # Another user's file of that name, or a link, is not followed.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    alone = False
    try:
        alone = _lock(fd, fcntl.LOCK_EX)
        # Shared, the lock lets all others in, and tells who comes later that the first is done.
        end = time.monotonic() + patience
        while not alone and not _lock(fd, fcntl.LOCK_SH) and time.monotonic() < end:
            time.sleep(random.uniform(POLL, 2 * POLL))
        yield alone
    finally:
        if alone:  # and still locked: who waits has it open, who comes later makes another
            path.unlink(missing_ok=True)
        os.close(fd)


def first_of_siblings(what: str) -> bool:
    """True for one of the processes that the same parent started, on this node, ever.

    Where the temporary folder takes no file, True for all of them. A file that says so is of no
    use once the parent is gone; the next to come removes it.

    >>> import uuid
    >>> once = uuid.uuid4().hex
    >>> first_of_siblings(once), first_of_siblings(once)
    (True, False)
    """
    path = node_local(what, f"{PARENT}-{START_OF_PARENT}.once")
    for old in path.parent.glob(f"{path.name.partition('.')[0].rpartition('-')[0]}-*.once"):
        pid, _, start = old.stem.rpartition(".")[2].partition("-")
        if not pid.isdigit() or str(start_time(int(pid))) != start:
            with contextlib.suppress(OSError):
                old.unlink()
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def node_local(what: str, kind: str) -> Path:
    """Return a path in the node's temporary folder, this user's own, for what has this name."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"lsweep-{user}-{short_hash(what)}.{kind}"


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

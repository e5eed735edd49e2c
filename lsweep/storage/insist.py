"""Calls on a shared file system, made again where the answer was lost or stale.

NFS and its like answer ESTALE for a file that was just replaced, and EIO for a change that may yet
have happened: the reply was lost, or a second try of the client met the work of the first. So a
look is made again a few times, and a change is made again unless there is evidence that it
happened. Opening asks the server; a mere ``stat`` may answer from what the node remembers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

VISIBLE = 75.0  # seconds after which a change by another node is seen: NFS remembers for up to 60
PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EREMOTEIO)
NAPS = (0.0, 0.01, 0.05, 0.2, 0.5)  # seconds before each further try

T = TypeVar("T")


def insist(call: Callable[[], T], also: tuple[int, ...] = ()) -> T:
    """Make a call until it answers; what may pass is tried again, a bounded number of times.

    Args:
        call: what can be done twice.
        also: further error numbers that may pass.

    Returns:
        What the call returns.

    Raises:
        OSError: the error does not pass.

    >>> answers = [OSError(errno.ESTALE, "Stale file handle"), None]
    >>> def look():
    ...     error = answers.pop(0)
    ...     if error:
    ...         raise error
    ...     return "there"
    >>> insist(look)
    'there'
    """
    for nap in NAPS:
        try:
            return call()
        except OSError as e:
            if e.errno not in (*PASSING, *also):
                raise
        time.sleep(nap)
    return call()


def settle(change: Callable[[], object], happened: Callable[[], bool]) -> None:
    """Make a change once, however many tries that takes.

    Args:
        change: what is to happen on the server.
        happened: after an error, whether it has happened all the same.

    Raises:
        OSError: it has not happened.
    """

    def attempt() -> None:
        try:
            change()
        except OSError:
            with contextlib.suppress(OSError):
                if insist(happened):
                    return
            raise

    insist(attempt)


def there(path: Path) -> bool:
    """Say whether a name exists, as far as this node knows."""
    return insist(path.exists)


def appears(path: Path, patience: float) -> bool:
    """Say whether a name that others make is there, or comes within ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            os.close(os.open(path.parent, os.O_RDONLY))  # a node that holds it for absent asks
        if there(path):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)


def read(path: Path) -> bytes:
    """Read a file.

    Raises:
        OSError: it is missing or cannot be read.
    """
    return insist(path.read_bytes)


def names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, without hidden ones; none when there is no folder.

    A listing opens the folder, which is fresher than looking for one name after another.

    >>> names(Path("nowhere"))
    []
    """
    try:
        found = insist(lambda: [p.name for p in folder.iterdir()])
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(n for n in found if not n.startswith("."))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless it is there."""
    settle(lambda: folder.mkdir(parents=True, exist_ok=True), folder.is_dir)


def link(source: Path, target: Path) -> None:
    """Give a file that nobody else knows a second name.

    The count of its names is the only witness of a lost reply; opening it makes the node ask.

    Raises:
        OSError: it has not got that name; FileExistsError: another file has it.
    """

    def happened() -> bool:
        fd = os.open(source, os.O_RDONLY)
        try:
            return os.fstat(fd).st_nlink == 2
        finally:
            os.close(fd)

    settle(lambda: os.link(source, target), happened)


def rename(source: Path, target: Path) -> None:
    """Rename a file that nobody else knows, over whatever has the name.

    Raises:
        OSError: it still has its old name.
    """

    def happened() -> bool:
        try:
            os.close(os.open(source, os.O_RDONLY))
        except FileNotFoundError:
            return target.exists()
        return False

    settle(lambda: source.replace(target), happened)


def discard(path: Path) -> None:
    """Remove a file that nobody else knows, if that can be; hidden litter harms nobody."""
    with contextlib.suppress(OSError):
        insist(lambda: path.unlink(missing_ok=True))

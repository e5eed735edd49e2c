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

PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EREMOTEIO)
NAPS = (0.0, 0.01, 0.05, 0.2, 0.5)  # seconds before each further try

T = TypeVar("T")


def insist(
    call: Callable[[], T],
    happened: Callable[[], bool] = lambda: False,
    also: tuple[int, ...] = (),
) -> T | None:
    """Make a call until it answers; what may pass is tried again, a bounded number of times.

    Args:
        call: a look, or a change.
        happened: after an error, whether the change is there all the same.
        also: further error numbers that may pass.

    Returns:
        What the call returns; None when it failed, yet what it should do has happened.

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
            with contextlib.suppress(OSError):
                if happened():
                    return None
            if e.errno not in (*PASSING, *also):
                raise
            time.sleep(nap)
    return call()


def there(path: Path) -> bool:
    """Say whether a name exists, as far as this node knows."""
    return bool(insist(path.exists))


def read(path: Path) -> bytes:
    """Read a file.

    Raises:
        OSError: it is missing or cannot be read.
    """
    data = insist(path.read_bytes)
    assert data is not None
    return data


def names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, without hidden ones; none when there is no folder.

    >>> names(Path("nowhere"))
    []
    """
    try:
        found = insist(lambda: os.listdir(folder))  # opens it: fresher than many looks
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(n for n in found or () if not n.startswith("."))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless it is there."""
    insist(lambda: folder.mkdir(parents=True, exist_ok=True), folder.is_dir)


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

    insist(lambda: os.link(source, target), lambda: bool(insist(happened)))


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

    insist(lambda: source.replace(target), lambda: bool(insist(happened)))


def discard(path: Path) -> None:
    """Remove a file that nobody else knows, if that can be; hidden litter harms nobody."""
    with contextlib.suppress(OSError):
        insist(lambda: path.unlink(missing_ok=True))

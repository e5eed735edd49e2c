"""A file appears whole or not at all: written beside its place, synced, then renamed over it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from lsweep.errors import LsweepError


def write_whole(target: str | os.PathLike[str], data: bytes) -> None:
    """Make or replace ``target``; what it held before stays until the very end.

    Its permissions are those that the umask asks for.

    Raises:
        LsweepError: the folder or the disk does not take the file.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_whole(folder / "a.txt", b"whole")
    >>> [(p.name, p.read_text()) for p in folder.iterdir()]
    [('a.txt', 'whole')]
    """
    place = Path(target)
    try:
        temporary = place.with_name(f".lsweep-{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as e:  # ValueError: a name that is empty or holds a NUL
        raise LsweepError(f"cannot write {place}: {getattr(e, 'strerror', None) or e}") from None

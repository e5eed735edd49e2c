"""Files that are whole or absent: published once by link, or replaced; JSON with a checksum."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lsweep.errors import DamagedFile, LsweepError
from lsweep.storage.insist import VISIBLE, appears, discard, insist, link, make_folder, read, rename

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
RENAME_PATIENCE = VISIBLE  # seconds between an exclusive name and the rename that it announces


def canonical(value: Any) -> bytes:
    """Return JSON in one form only: sorted keys, no spaces, no NaN.

    >>> canonical({"b": 1, "a": [1.5]})
    b'{"a":[1.5],"b":1}'
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    ).encode()


def digest(value: Any) -> str:
    """Return the sha256 of the canonical JSON of ``value``.

    >>> digest({})[:8]
    '44136fa3'
    """
    return hashlib.sha256(canonical(value)).hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one line that names what could not be written.

    Raises:
        LsweepError: instead of an `OSError`.
    """
    try:
        yield
    except OSError as e:
        reason = os.strerror(e.errno) if e.errno else str(e)
        if e.errno in FULL:
            reason += "; make room, then run the same command again: nothing committed is lost"
        raise LsweepError(f"cannot write {path}: {reason}") from None


def sync_folder(folder: Path) -> None:
    """Make names in ``folder`` survive a crash of the node, where the file system can."""
    with contextlib.suppress(OSError):  # some file systems refuse fsync on a directory
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def scratch(path: Path) -> Path:
    """Return a name beside ``path`` that nobody else uses; readers pass over hidden names."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def write_new(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a file under a name that nobody reads yet."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def write_scratch(path: Path, data: bytes, *, sync: bool = True) -> Path:
    """Write a hidden file beside ``path``, and return its name.

    Raises:
        OSError: the disk does not take it; nothing is left behind.
    """

    def attempt() -> Path:
        temporary = scratch(path)
        try:
            write_new(temporary, data, sync=sync)
        except BaseException:
            discard(temporary)
            raise
        return temporary

    # Each try has a name of its own, so "it exists" can only be a lost reply.
    return insist(attempt, also=(errno.EEXIST,))


def link_once(temporary: Path, path: Path) -> bool:
    """Give ``temporary`` the name ``path`` unless that exists; True for exactly one caller.

    link(2) makes name and content appear together, also on NFS.
    """
    try:
        link(temporary, path)
    except FileExistsError:
        return False
    except OSError as e:
        if e.errno in NO_LINKS:
            return _claim_without_links(temporary, path)
        raise
    return True


def _claim_without_links(temporary: Path, path: Path) -> bool:
    # No hard links here (exFAT, some FUSE): an exclusive name decides, a rename publishes. Whoever
    # loses waits for that; should the winner have died in between, the next name decides anew.
    for n in itertools.count():
        name = path.with_name(f".{path.name}.claim{n}")
        try:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            if appears(path, RENAME_PATIENCE):
                return False
        else:
            rename(temporary, path)
            return True
    raise AssertionError  # never: counting does not end


def publish(path: Path, data: bytes, *, sync: bool = True) -> bool:
    """Publish ``data`` as ``path`` if nobody has yet; the first wins and nobody ever changes it.

    Args:
        path: what can be read as soon as this returns, if it is synced.
        data: the whole content.
        sync: False for what may vanish with a crash of the node.

    Returns:
        True when this call published it.

    Raises:
        LsweepError: the disk does not take it.
    """
    with writing(path):
        try:
            temporary = write_scratch(path, data, sync=sync)
        except FileNotFoundError:  # seldom: its folder is made when it is needed
            make_folder(path.parent)
            temporary = write_scratch(path, data, sync=sync)
        try:
            won = link_once(temporary, path)
        finally:
            discard(temporary)
        if sync:
            sync_folder(path.parent)
            appears(path, VISIBLE)  # this node may still hold it for absent
    return won


def replace(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Write ``data`` as ``path``, whole or not at all, over whatever was there."""
    temporary = write_scratch(path, data, sync=sync)
    try:
        rename(temporary, path)
    except BaseException:
        discard(temporary)
        raise


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Make or replace what a user asked for, synced; what was there before stays until the end.

    Raises:
        LsweepError: the folder or the disk does not take the file.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_whole(folder / "a.txt", b"whole")
    >>> [(p.name, p.read_text()) for p in folder.iterdir()]
    [('a.txt', 'whole')]
    """
    try:
        with writing(Path(path)):
            replace(Path(path), data, sync=True)
    except ValueError as e:  # a name that is empty or holds a NUL
        raise LsweepError(f"cannot write {os.fspath(path)}: {e}") from None


def sealed(value: dict[str, Any]) -> bytes:
    """Return the JSON of ``value`` with its own sha256 inside.

    >>> unsealed(sealed({"a": 1}), "here")
    {'a': 1}
    """
    text = json.dumps({**value, "sha256": digest(value)}, sort_keys=True, indent=1, allow_nan=False)
    return text.encode() + b"\n"


def unsealed(data: bytes, where: str) -> dict[str, Any]:
    """Read what `sealed` wrote.

    Raises:
        DamagedFile: it was truncated or altered.
    """
    try:
        value = json.loads(data)
        seal = value.pop("sha256")
        good = seal == digest(value)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        good = False
    if not good:
        raise DamagedFile(f"{where} is damaged: its content does not match its checksum")
    assert isinstance(value, dict)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a sealed JSON file.

    Raises:
        DamagedFile: it was truncated or altered.
        LsweepError: it is missing or cannot be read.
    """
    try:
        data = read(path)
    except OSError as e:
        raise LsweepError(f"cannot read {path}: {e.strerror}") from None
    return unsealed(data, str(path))


def readable(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the sealed JSON files among ``paths`` that can be read; `verify` names the others."""
    found = []
    for path in paths:
        with contextlib.suppress(LsweepError):
            found.append(read_json(path))
    return found

"""A shared file system with the weaknesses of NFS, in small: a FUSE mount is one client's view.

Several mounts of one folder are several nodes. Each remembers names (also that one is absent),
attributes and listings for some seconds, keeps the pages of a file from its opening to its
closing, and shows its own changes at once; opening a file or a folder asks the server (close to
open). What a client did itself it never sees late: Linux drops what it remembers of a name that it
creates, links, renames or removes. Faults strike at random, by seed: a change that happened whose
reply is lost, stale handles, a disk that refuses. Locks are the node's own.

    python weak_filesystem.py BACKING MOUNT '{"seconds": 60, "seed": 1, "lost": 0.1}'

While it is mounted, ``os.setxattr(MOUNT, "user.weak", b'{"lost": 0.5}')`` changes a setting, and
``user.forget`` lets it forget all it remembers, as if the time had passed.
"""

# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH116, PTH120, PTH208

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = 4096
SETTINGS: dict[str, Any] = {
    "seconds": 1.0,  # how long names, attributes and listings are remembered
    "seed": 0,
    "open_folder_asks": True,  # opening a folder asks whether it changed (NFS without nocto)
    "lost": 0.0,  # share of changes of names that happen, but are answered with an error
    "stale": 0.0,  # share of looks and reads that are answered with ESTALE
    "disk": 0.0,  # share of writes and syncs that are refused
    "links": "exclusive",  # or "none"; or "overwrite": decided by what this client remembers
    "delay": 0.0,  # seconds that a change of names takes
}
RETRANSMITTED = {"link": errno.EEXIST, "mkdir": errno.EEXIST, "create": errno.EEXIST,
                 "rename": errno.ENOENT, "unlink": errno.ENOENT, "rmdir": errno.ENOENT}  # fmt: skip
LOOKS = ("getattr", "open", "opendir", "readdir", "read")
DISK = ("write", "fsync", "flush")


def error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@dataclass
class Handle:
    """An open file: what it read, until it is closed."""

    fd: int
    inode: int
    size: int
    writes: bool
    pages: dict[int, bytes] = field(default_factory=dict)


class Client:
    """One node's view of the folder that all share; method names are fusepy's."""

    def __init__(self, backing: str, settings: dict[str, Any]) -> None:
        self.root, self.set = backing, {**SETTINGS, **settings}
        self.names: dict[str, tuple[float, dict[str, Any] | None]] = {}
        self.listings: dict[str, tuple[float, int, list[str]]] = {}
        self.handles: dict[int, Handle] = {}
        self.dice = random.Random(self.set["seed"])

    def __call__(self, operation: str, *arguments: Any) -> Any:
        """Do what the kernel asks, or what goes wrong with it."""
        method = getattr(self, operation, None)
        if method is None:
            raise error(errno.ENOSYS)
        if operation in LOOKS and self.dice.random() < self.set["stale"]:
            raise error(errno.ESTALE)
        writes = operation in DISK and self.handles[arguments[-1]].writes
        if writes and self.dice.random() < self.set["disk"]:
            raise error(self.dice.choice([errno.EIO, errno.ESTALE]))
        if operation in RETRANSMITTED:
            time.sleep(self.set["delay"])
            known = dict(self.names)
            answer = method(*arguments)
            if self.dice.random() < self.set["lost"]:
                self.names = known  # the reply would have brought the new attributes
                # Linux drops the name that is changed; what it knows of a link's source stays.
                self.changed(
                    *[p for p in arguments if isinstance(p, str)][: 1 if operation == "link" else 2]
                )
                if operation == "create":
                    self.release("", answer)
                raise error(self.dice.choice([errno.EIO, RETRANSMITTED[operation]]))
            return answer
        return method(*arguments)

    # -- what is remembered ------------------------------------------------------------------------

    def at(self, path: str) -> str:
        return self.root + path

    def server(self, path: str) -> dict[str, Any] | None:
        """Ask the server for a name's attributes, and remember them."""
        try:
            st = os.lstat(self.at(path))
            keys = ("st_mode", "st_nlink", "st_size", "st_ino", "st_uid", "st_gid", "st_mtime",
                    "st_ctime", "st_atime", "st_blocks")  # fmt: skip
            found = {k: getattr(st, k) for k in keys}
        except (FileNotFoundError, NotADirectoryError):
            found = None
        self.names[path] = (time.monotonic() + self.set["seconds"], found)
        return found

    def seen(self, path: str) -> dict[str, Any] | None:
        until, found = self.names.get(path, (0.0, None))
        return found if time.monotonic() < until else self.server(path)

    def changed(self, *paths: str) -> None:
        """This client changed names: it forgets what it remembers of them and their folders."""
        for path in paths:
            self.names.pop(path, None)
            parent = os.path.dirname(path)
            self.names.pop(parent, None)
            self.listings.pop(parent, None)

    # -- looking -----------------------------------------------------------------------------------

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = self.seen(path)
        if found is None:
            raise error(errno.ENOENT)
        return found

    def opendir(self, path: str) -> int:
        if self.set["open_folder_asks"]:
            self.names.pop(path, None)
            now = self.seen(path)
            known = self.listings.get(path)
            if known and (now is None or os.stat(self.at(path)).st_mtime_ns != known[1]):
                del self.listings[path]
                inside = [p for p, (_, f) in self.names.items() if f is None]
                for absent in (p for p in inside if os.path.dirname(p) == path):
                    del self.names[absent]
        return 0

    def readdir(self, path: str, fh: int) -> list[str]:
        until, _, names = self.listings.get(path, (0.0, 0, []))
        if time.monotonic() >= until:
            stamp = os.stat(self.at(path)).st_mtime_ns
            names = [".", "..", *os.listdir(self.at(path))]
            self.listings[path] = (time.monotonic() + self.set["seconds"], stamp, names)
        return names

    def open(self, path: str, flags: int) -> int:
        known = self.names.pop(path, (0.0, None))[1]
        now = self.server(path)
        if known and (now is None or now["st_ino"] != known["st_ino"]):
            raise error(errno.ESTALE)  # the file that this client knows by the name is gone
        return self._handle(os.open(self.at(path), flags & ~(os.O_CREAT | os.O_EXCL)), flags)

    def _handle(self, fd: int, flags: int) -> int:
        st = os.fstat(fd)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        self.handles[fd] = Handle(fd, st.st_ino, st.st_size, writes)
        return fd

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        handle = self.handles[fh]
        if os.fstat(fh).st_nlink == 0:
            raise error(errno.ESTALE)  # another client removed or replaced it
        if handle.writes:
            return os.pread(fh, size, offset)
        end = min(offset + size, handle.size)
        first, last = offset // PAGE, max(0, end - 1) // PAGE
        for page in range(first, last + 1):
            if page not in handle.pages:
                handle.pages[page] = os.pread(fh, PAGE, page * PAGE)
        data = b"".join(handle.pages[p].ljust(PAGE, b"\0") for p in range(first, last + 1))
        return data[offset - first * PAGE : max(offset, end) - first * PAGE]

    def statfs(self, path: str) -> dict[str, int]:
        st = os.statvfs(self.root)
        keys = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree",
                "f_favail", "f_namemax")  # fmt: skip
        return {k: getattr(st, k) for k in keys}

    # -- changing names ----------------------------------------------------------------------------

    def create(self, path: str, mode: int, fi: object = None) -> int:
        self.changed(path)
        fd = os.open(self.at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        return self._handle(fd, os.O_RDWR)

    def link(self, target: str, source: str) -> None:
        if self.set["links"] == "none":
            raise error(errno.EPERM)
        absent = self.names.get(target, (0.0, {}))[1] is None
        self.changed(target)
        if self.set["links"] == "overwrite" and absent:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.at(target))
        os.link(self.at(source), self.at(target))
        self.names.pop(source, None)

    def mkdir(self, path: str, mode: int) -> None:
        self.changed(path)
        os.mkdir(self.at(path), mode)

    def rename(self, old: str, new: str) -> None:
        self.changed(old, new)
        os.rename(self.at(old), self.at(new))

    def unlink(self, path: str) -> None:
        self.changed(path)
        os.unlink(self.at(path))

    def rmdir(self, path: str) -> None:
        self.changed(path)
        os.rmdir(self.at(path))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self.at(path), mode)
        self.names.pop(path, None)

    def utimens(self, path: str, times: tuple[float, float] | None = None) -> None:
        os.utime(self.at(path), times)
        self.names.pop(path, None)

    # -- changing data -----------------------------------------------------------------------------

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        if os.fstat(fh).st_nlink == 0:
            raise error(errno.ESTALE)
        count = os.pwrite(fh, data, offset)
        self._written(path, self.handles[fh].inode)
        return count

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self.at(path), length)
        self._written(path, os.stat(self.at(path)).st_ino)

    def _written(self, path: str, inode: int) -> None:
        self.names.pop(path, None)
        for handle in self.handles.values():
            if handle.inode == inode:
                handle.pages.clear()
                handle.size = os.fstat(handle.fd).st_size

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        os.fsync(fh)

    def flush(self, path: str, fh: int) -> None:
        """Closing tells whether everything was written."""

    def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
        """The server does it by itself."""

    def release(self, path: str, fh: int) -> None:
        self.handles.pop(fh, None)
        os.close(fh)

    # -- what the kernel and the tests say ---------------------------------------------------------

    def init(self, path: str) -> None: ...

    def destroy(self, path: str) -> None: ...

    def access(self, path: str, mode: int) -> None:
        """Allowed."""

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> None:
        if name == "user.weak":
            self.set |= json.loads(value)
            self.dice = random.Random(self.set["seed"])
        elif name == "user.forget":
            self.names.clear()
            self.listings.clear()
        else:
            raise error(errno.EOPNOTSUPP)


@contextlib.contextmanager
def mounted(backing: Path, mount: Path, **settings: Any) -> Iterator[Path]:
    """Show ``backing`` at ``mount`` as one client of a weak file system sees it."""
    backing.mkdir(parents=True, exist_ok=True)
    mount.mkdir(parents=True, exist_ok=True)
    log = mount.with_suffix(".log")
    with log.open("w") as out:
        words = [sys.executable, __file__, str(backing), str(mount), json.dumps(settings)]
        server = subprocess.Popen(words, stdout=out, stderr=out)
    try:
        while not os.path.ismount(mount):
            assert server.poll() is None, log.read_text()
            time.sleep(0.01)
        yield mount
    finally:
        subprocess.run(["fusermount", "-u", "-z", str(mount)], check=False)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def tell(mount: Path, **settings: Any) -> None:
    """Change settings of a mounted client."""
    os.setxattr(mount, "user.weak", json.dumps(settings).encode())


def forget(mount: Path) -> None:
    """Let a client forget what it remembers, as if the time had passed."""
    os.setxattr(mount, "user.forget", b"")


if __name__ == "__main__":
    import fuse

    fuse.FUSE(
        Client(sys.argv[1], json.loads(sys.argv[3])),
        sys.argv[2],
        foreground=True,
        nothreads=True,
        use_ino=True,
        direct_io=True,  # no pages in the kernel: what is remembered is decided here
        big_writes=True,
        entry_timeout=0,
        attr_timeout=0,
        negative_timeout=0,
    )

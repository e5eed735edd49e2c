"""Parts: the one file a worker process commits to, whose rows check themselves.

A part is a valid HDF5 file from the moment it has its name: structure complete, closed, synced,
then linked. After that only bytes of preallocated rows change, by ``pwrite`` at the dataset's
address, so that no crash can harm the structure; a row is a row when its CRC-32 says so. Nothing
is repaired: a new process writes a new part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lsweep.errors import LsweepError
from lsweep.storage.files import link_once, scratch, sync_folder
from lsweep.storage.insist import discard
from lsweep.storage.rows import TEXT, TEXTS, Rows, row_type, seed_of

CAPACITIES = (256, 1024, 4096, 16384)


class PartWriter:
    """One process's part: append rows, sync; after an error of the disk it is closed for good."""

    def __init__(
        self, path: Path, *, plan: str, variables: int, capacity: int, header: dict[str, str]
    ) -> None:
        self.path, self.plan, self.capacity = path, plan, capacity
        self.rows = 0
        self._texts: dict[str, int] = {}
        self.closed = False
        self.dirty = False
        self._size = row_type(variables).itemsize
        self._seed = seed_of(plan)
        temporary = scratch(path)
        self._fd = -1
        try:
            # v108 headers carry checksums, and unlike newer ones no "open for writing" mark.
            with h5py.File(temporary, "w", libver=("v108", "v108")) as f:
                f.attrs["lsweep_part"] = np.int64(1)
                f.attrs["plan"] = np.bytes_(plan)
                for key, value in header.items():
                    f.attrs[key] = np.bytes_(value.encode() or b" ")
                self._text_at = _preallocate(f, b"texts", TEXT, TEXTS)
                self._row_at = _preallocate(f, b"rows", row_type(variables), capacity)
            assert self._row_at % 8 == 0  # so that salvage may scan aligned
            self._fd = os.open(temporary, os.O_RDWR)
            end = max(self._row_at + capacity * self._size, os.fstat(self._fd).st_size)
            try:
                os.posix_fallocate(self._fd, 0, end)  # a full disk shows here, not in mid-run
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                os.ftruncate(self._fd, end)
            os.fsync(self._fd)
            if not link_once(temporary, path):
                raise LsweepError(f"part {path} exists: two workers share one name")
            sync_folder(path.parent)
        except RuntimeError as e:  # so HDF5 calls it when closing fails to write
            self.close()
            raise OSError(errno.EIO, str(e)) from None
        except BaseException:
            self.close()
            raise
        finally:
            discard(temporary)

    @property
    def free(self) -> int:
        """Rows that still fit."""
        return 0 if self.closed else self.capacity - self.rows

    def note(self, text: str) -> int:
        """Store a reason, once, and return its number; 0 when there is no room for another."""
        if text in self._texts or len(self._texts) >= TEXTS - 1:
            return self._texts.get(text, 0)
        record = np.zeros((), TEXT)
        record["text"] = text.encode()[:248].decode(errors="ignore").encode()
        record["crc"] = zlib.crc32(record.tobytes()[:-4], self._seed)
        number = len(self._texts) + 1
        self._write(record.tobytes(), self._text_at + number * TEXT.itemsize)
        self._texts[text] = number
        return number

    def append(self, rows: Rows) -> None:
        """Commit rows in one write; after it returns, no kill of this process loses them.

        Raises:
            OSError: the disk refused; this part is then closed for good.
        """
        assert len(rows) <= self.free
        sealed, size = rows.copy(), self._size
        view = memoryview(rows.tobytes())
        sealed["crc"] = [
            zlib.crc32(view[at : at + size - 4], self._seed) for at in range(0, len(view), size)
        ]
        self._write(sealed.tobytes(), self._row_at + self.rows * size)
        self.rows += len(rows)
        self.dirty = True

    def _write(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        try:
            while view:
                n = os.pwrite(self._fd, view, at)
                view, at = view[n:], at + n
        except OSError:
            self.close()
            raise

    def sync(self) -> None:
        """Make what was appended survive a crash of the node.

        Raises:
            OSError: the disk refused; this part is then closed for good.
        """
        if self.closed:
            return
        self.dirty = False
        try:
            os.fdatasync(self._fd)
        except OSError:
            self.close()
            raise

    def duplicate(self) -> int:
        """Return another descriptor, to sync what was appended so far while more is appended."""
        self.dirty = False
        return os.dup(self._fd)

    def close(self) -> None:
        """Close for good."""
        self.closed = True
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)


def _preallocate(f: h5py.File, name: bytes, dtype: np.dtype[Any], count: int) -> int:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # the address exists before the first write
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # the file system's zeros serve
    space = h5py.h5s.create_simple((count,))
    kind = h5py.h5t.py_create(dtype, logical=True)
    offset: int | None = h5py.h5d.create(f.id, name, kind, space, layout).get_offset()
    assert offset is not None
    return offset

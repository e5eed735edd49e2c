"""Parts: the one file a worker process commits to, whose rows check themselves.

A part is a valid HDF5 file from the moment it has its name: structure complete, closed, synced,
then linked. After that only bytes of preallocated rows change, by ``pwrite`` at the dataset's
address, so that no crash can harm the structure; a row is a row when its CRC-32 says so. Nothing
is repaired: a new process writes a new part.

Row: point u64 | slice u32 | kind u8 | status u8 | text u16 | seconds f64 | sums f64[V, 8] |
device u32 | crc u32, where V variables have the eight sums of `sums.SUMS`.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.files import link_once, scratch, sync_folder
from lsweep.insist import discard, insist, read
from lsweep.sums import SUMS

TEXTS = 64
TEXT = np.dtype([("text", "S248"), ("spare", "<u4"), ("crc", "<u4")])
CAPACITIES = (256, 1024, 4096, 16384)
Rows = npt.NDArray[np.void]


class Kind(enum.IntEnum):
    """What a row is: the value itself, or a second evaluation that audits it."""

    VALUE = 0
    AUDIT = 1


def row_type(variables: int) -> np.dtype[np.void]:
    """Return the dtype of a row; a multiple of 8 bytes, so that salvage can scan aligned.

    >>> row_type(2).itemsize
    160
    """
    return np.dtype(
        [
            ("point", "<u8"),
            ("slice", "<u4"),
            ("kind", "u1"),
            ("status", "u1"),
            ("text", "<u2"),
            ("seconds", "<f8"),
            ("sums", "<f8", (variables, len(SUMS))),
            ("device", "<u4"),
            ("crc", "<u4"),
        ]
    )


def seal(data: bytes | memoryview, plan: str) -> int:
    """Return the CRC-32 of a record, seeded with the plan, so rows of another run never pass."""
    return zlib.crc32(data, zlib.crc32(plan.encode()))


def device_code(name: str) -> int:
    """Return the 32-bit code by which rows name their device class."""
    return zlib.crc32(name.encode())


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
        record["text"] = text.encode()[:248]
        number = len(self._texts) + 1
        self._write(_sealed(record, self.plan), self._text_at + number * TEXT.itemsize)
        self._texts[text] = number
        return number

    def append(self, rows: Rows) -> None:
        """Commit rows in one write; after it returns, no kill of this process loses them.

        Raises:
            OSError: the disk refused; this part is then closed for good.
        """
        assert len(rows) <= self.free
        data = b"".join(_sealed(row, self.plan) for row in rows)
        self._write(data, self._row_at + self.rows * self._size)
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


def _sealed(record: np.ndarray[Any, Any] | np.void, plan: str) -> bytes:
    body = record.tobytes()[:-4]
    return body + seal(body, plan).to_bytes(4, "little")


@dataclass(frozen=True)
class Part:
    """What a part holds: its valid rows and what was wrong with it.

    Attributes:
        path: the file.
        rows: valid rows, dtype `row_type`, in the order of their slots.
        header: worker, device class and the like; empty when it could not be read.
        texts: reasons by number, 1 and up.
        damaged: number of slots that hold something but fail their checksum.
        salvaged: True when HDF5 refused the file and its raw bytes were scanned.
    """

    path: Path
    rows: Rows
    header: dict[str, str] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    damaged: int = 0
    salvaged: bool = False

    def reason(self, row: np.void) -> str:
        """Return the text that belongs to a failed row."""
        return self.texts.get(int(row["text"]), "reason not recorded")


def read_part(path: Path, plan: str, variables: int) -> Part:
    """Read the valid rows of a part, at any moment of its life and after any damage.

    Never a wrong value: each row is checked on its own. When HDF5 cannot open the file, its bytes
    are scanned for rows, which are self-checking and 8-byte aligned.

    Raises:
        LsweepError: the file cannot be read at all.
    """
    dtype = row_type(variables)
    try:
        opened = insist(lambda: h5py.File(path, "r", locking="best-effort"))
        with opened as f:
            rows_at, texts_at = f["rows"].id.get_offset(), f["texts"].id.get_offset()
            capacity = len(f["rows"])
            header = {k: v.decode().strip() for k, v in f.attrs.items() if isinstance(v, bytes)}
            sound = f["rows"].dtype.itemsize == dtype.itemsize and header.get("plan") == plan
        data = read(path)
    except OSError as e:
        if not insist(path.is_file):
            raise LsweepError(f"cannot read {path}: {e.strerror or e}") from None
        sound = False
    except Exception:  # HDF5 reports damage as almost any exception
        sound = False
    if not sound or rows_at is None or texts_at is None:
        return _salvage(path, plan, dtype)
    size = dtype.itemsize
    block = data[rows_at : rows_at + capacity * size]
    whole = len(block) // size
    good, damaged = [], 0
    view = memoryview(block)
    status_at = dtype.fields["status"][1]  # type: ignore[index]
    seed = zlib.crc32(plan.encode())
    empty = bytes(size)
    for start in range(0, whole * size, size):
        slot = view[start : start + size]
        if zlib.crc32(slot[:-4], seed) == int.from_bytes(slot[-4:], "little") and slot[status_at]:
            good.append(start // size)
        elif slot != empty:
            damaged += 1
    rows = np.frombuffer(block, dtype, whole)[np.array(good, dtype=np.int64)]
    texts = {}
    for i in range(1, TEXTS):
        record = data[texts_at + i * TEXT.itemsize : texts_at + (i + 1) * TEXT.itemsize]
        if len(record) == TEXT.itemsize and _valid(record, seed):
            texts[i] = np.frombuffer(record, TEXT)[0]["text"].decode(errors="replace")
    return Part(path, rows, header, texts, damaged, False)


def _valid(record: bytes, seed: int) -> bool:
    return zlib.crc32(record[:-4], seed) == int.from_bytes(record[-4:], "little")


def _salvage(path: Path, plan: str, dtype: np.dtype[np.void]) -> Part:
    try:
        data = read(path)
    except OSError as e:
        raise LsweepError(f"cannot read {path}: {e.strerror}") from None
    seed, size = zlib.crc32(plan.encode()), dtype.itemsize
    status_at = dtype.fields["status"][1]  # type: ignore[index]
    found, at = [], 0
    while at + size <= len(data):
        record = data[at : at + size]
        if record[status_at] and _valid(record, seed):
            found.append(record)
            at += size
        else:
            at += 8
    return Part(path, np.frombuffer(b"".join(found), dtype), {}, {}, 0, True)

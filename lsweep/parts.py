"""Parts: the one file a worker process commits to, whose rows check themselves.

A part is a valid HDF5 file from the moment it has its name: structure complete, closed, synced,
then linked. After that only bytes of preallocated rows change, by ``pwrite`` at the dataset's
address, so that no crash can harm the structure; a row is a row when its CRC-32 says so. Nothing
is repaired: a new process writes a new part.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.files import link_once, scratch, sync_folder
from lsweep.insist import discard, insist
from lsweep.rows import KIND_AT, STATUS_AT, is_valid, seed_of, valid_rows
from lsweep.rows import Kind as Kind  # those who write or read parts need these too
from lsweep.rows import Rows as Rows
from lsweep.rows import device_code as device_code
from lsweep.rows import row_type as row_type
from lsweep.surface import Status

TEXTS = 64
TEXT = np.dtype([("text", "S248"), ("spare", "<u4"), ("crc", "<u4")])
CAPACITIES = (256, 1024, 4096, 16384)
FIRST_LOOK, PIECE = 2**14, 2**19  # bytes read at once
DOUBT = 180.0  # seconds: a shared file system may show a row that long after those behind it
IntArray = npt.NDArray[np.int64]


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
        record["text"] = text.encode()[:248]
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


class _Place(NamedTuple):
    """Where things lie in a part: bytes from its beginning, and slots."""

    rows: int
    texts: int
    capacity: int


class PartReader:
    """Reads a part at any moment of its life and after any damage, and later what was appended.

    Never a wrong value: a row counts when its CRC says so. When HDF5 cannot open the file, its
    bytes are scanned for rows, which are self-checking and 8-byte aligned.

    Args:
        path: the part.
        plan: digest of the plan.
        variables: how many variables a row has.
        clock: seconds; for tests.

    Attributes:
        path: the part.
        header: worker, device class and the like; empty when it could not be read.
        salvaged: how many rows were found by scanning; None when HDF5 can open the file.
    """

    def __init__(
        self,
        path: Path,
        plan: str,
        variables: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self._plan, self._clock = path, plan, clock
        self.header: dict[str, str] = {}
        self.salvaged: int | None = None
        self._type, self._seed = row_type(variables), seed_of(plan)
        self._size = self._type.itemsize
        self._place: _Place | None = None
        self._texts: dict[int, str] = {}
        self._forget()

    def _forget(self) -> None:
        self._begun = False
        self._next = 0  # the slot after the last that held something
        self._doubts: dict[int, float] = {}  # slots before that without a valid row, since when
        self._damaged: set[int] = set()  # those, and the given up, that hold something
        self._scanned: tuple[int, int] | None = None
        self._found: set[int] = set()  # where the salvaged rows lie

    @property
    def damaged(self) -> int:
        """Number of slots that hold something but fail their checksum."""
        return len(self._damaged)

    def reason(self, text: int) -> str:
        """Return the text that belongs to a failed row."""
        return self._texts.get(text, "reason not recorded")

    def news(self) -> Iterator[tuple[IntArray, Rows]]:
        """Yield the valid rows that were not yielded before, piece by piece, with their slots.

        A full or unchanged part costs next to nothing. A slot that was empty or damaged while
        later ones were not is read again for `DOUBT` seconds, then given up.

        Raises:
            LsweepError: the file cannot be read at all.
        """
        if self._place is None and self.salvaged is None:
            self._place = self._open()
        first, self._begun = not self._begun, True
        if self._place is None:
            yield from self._salvage()
        elif first or self._doubts or self._next < self._place.capacity:
            with _opened(self.path) as fd:
                yield from self._retried(fd, self._place)
                yield from self._appended(fd, self._place, first)

    def again(self) -> Iterator[tuple[IntArray, Rows]]:
        """Yield all valid rows once more, from the beginning."""
        other = copy.copy(self)
        other._forget()
        return other.news()

    def _open(self) -> _Place | None:
        try:
            opened = insist(lambda: h5py.File(self.path, "r", locking="best-effort"))
            with opened as f:
                rows, texts = f["rows"], f["texts"]
                rows_at, texts_at = rows.id.get_offset(), texts.id.get_offset()
                attributes = {k: v for k, v in f.attrs.items() if isinstance(v, bytes)}
                header = {k: v.decode().strip() for k, v in attributes.items()}
                sound = rows.dtype.itemsize == self._size and header.get("plan") == self._plan
                if sound and rows_at is not None and texts_at is not None:
                    self.header = header
                    return _Place(rows_at, texts_at, len(rows))
        except OSError as e:
            if not insist(self.path.is_file):
                raise LsweepError(f"cannot read {self.path}: {e.strerror or e}") from None
        except Exception:  # HDF5 reports damage as almost any exception
            pass
        self.salvaged = 0
        return None

    def _retried(self, fd: int, place: _Place) -> Iterator[tuple[IntArray, Rows]]:
        size, now = self._size, self._clock()
        for slot, since in list(self._doubts.items()):
            data = os.pread(fd, size, place.rows + slot * size)
            if len(data) == size and data[STATUS_AT] and is_valid(data, self._seed):
                del self._doubts[slot]
                self._damaged.discard(slot)
                row = np.frombuffer(data, self._type)
                self._read_texts(fd, place, row)
                yield np.array([slot]), row
            elif now - since > DOUBT:
                del self._doubts[slot]

    def _appended(
        self, fd: int, place: _Place, to_the_end: bool
    ) -> Iterator[tuple[IntArray, Rows]]:
        """Read on; at the first look to the end, for after a power loss there may be holes."""
        size, at = self._size, self._next
        piece = PIECE if to_the_end else FIRST_LOOK
        while at < place.capacity:
            wanted = min(max(1, piece // size), place.capacity - at)
            data = os.pread(fd, wanted * size, place.rows + at * size)
            used = -(-len(data.rstrip(b"\0")) // size)
            if used:
                self._doubt(range(self._next, at))
                self._next = at + used
                rows = np.frombuffer(data, self._type, min(used, len(data) // size))
                valid = valid_rows(data[: len(rows) * size], size, self._seed)
                valid &= rows["status"] > 0
                wrong = np.flatnonzero(~valid)
                self._doubt((at + wrong).tolist())
                self._damaged |= {at + i for i in wrong.tolist() if rows[i].tobytes().strip(b"\0")}
                if len(wrong) < len(rows):
                    rows = rows[valid] if len(wrong) else rows
                    self._read_texts(fd, place, rows)
                    yield at + np.flatnonzero(valid), rows
            if len(data) < wanted * size or not (used or to_the_end):
                return
            at, piece = at + wanted, PIECE

    def _doubt(self, slots: Iterable[int]) -> None:
        now = self._clock()
        self._doubts.update((slot, now) for slot in slots)

    def texts(self) -> dict[int, str]:
        """Return all reasons that can be read, by number."""
        if self._place is not None:
            with _opened(self.path) as fd:
                self._read_texts(fd, self._place)
        return dict(self._texts)

    def _read_texts(self, fd: int, place: _Place, rows: Rows | None = None) -> None:
        """Read the reasons where one is new; they are written before the rows that need them."""
        if rows is not None and all(n in self._texts for n in set(rows["text"].tolist()) if n):
            return
        data = os.pread(fd, TEXTS * TEXT.itemsize, place.texts)
        for i in range(1, len(data) // TEXT.itemsize):
            record = data[i * TEXT.itemsize : (i + 1) * TEXT.itemsize]
            if is_valid(record, self._seed):
                text = np.frombuffer(record, TEXT)[0]["text"]
                self._texts[i] = text.decode(errors="replace")

    def _salvage(self) -> Iterator[tuple[IntArray, Rows]]:
        with _opened(self.path) as fd:
            stat = os.fstat(fd)
            if self._scanned == (stat.st_size, stat.st_mtime_ns):
                return
            self._scanned = stat.st_size, stat.st_mtime_ns
            data = b"".join(iter(lambda: os.read(fd, PIECE), b""))
        size = self._size
        starts = np.arange(0, max(0, len(data) - size + 1), 8)
        octets = np.frombuffer(data, np.uint8)
        # Few places look like a row at all: those are checked.
        status, kind = octets[starts + STATUS_AT], octets[starts + KIND_AT]
        likely = starts[(status > 0) & (status < len(Status)) & (kind < len(Kind))]
        free, found = 0, []
        for at in likely.tolist():
            if at >= free and is_valid(data[at : at + size], self._seed):
                free = at + size
                if at not in self._found:
                    found.append(at)
        self._found.update(found)
        self.salvaged = len(self._found)
        if found:
            joined = b"".join(data[at : at + size] for at in found)
            yield np.array(found) // 8, np.frombuffer(joined, self._type)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = insist(lambda: os.open(path, os.O_RDONLY))
    except OSError as e:
        raise LsweepError(f"cannot read {path}: {e.strerror}") from None
    try:
        yield fd
    except OSError as e:
        raise LsweepError(f"cannot read {path}: {e.strerror}") from None
    finally:
        os.close(fd)


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

    Raises:
        LsweepError: the file cannot be read at all.
    """
    reader = PartReader(path, plan, variables)
    pieces = [rows for _, rows in reader.news()]
    rows = np.concatenate(pieces) if pieces else np.empty(0, row_type(variables))
    salvaged = reader.salvaged is not None
    return Part(path, rows, reader.header, reader.texts(), reader.damaged, salvaged)

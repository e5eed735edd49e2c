"""Reading parts: at any moment of their lives, after any damage, and on from where it was left."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from lsweep.errors import LsweepError
from lsweep.plans.points import IntArray
from lsweep.storage.insist import insist
from lsweep.storage.rows import (
    KIND_AT,
    STATUS_AT,
    TEXT,
    TEXTS,
    Kind,
    Rows,
    is_valid,
    row_type,
    seed_of,
    valid_rows,
)
from lsweep.surfaces.surface import Status

FIRST_LOOK, PIECE = 2**14, 2**19  # bytes read at once
DOUBT = 180.0  # seconds: a shared file system may show a row that long after those behind it


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
            with _Source(self.path) as source:
                yield from self._retried(source, self._place)
                yield from self._appended(source, self._place, first)

    def again(self) -> Iterator[tuple[IntArray, Rows]]:
        """Yield all valid rows once more, from the beginning."""
        other = copy.copy(self)
        other._forget()
        return other.news()

    def _open(self) -> _Place | None:
        # HDF5 hides a stale handle behind almost any exception: what is damaged stays so.
        place = self._tried() or self._tried()
        if place is None:
            self.salvaged = 0
        return place

    def _tried(self) -> _Place | None:
        try:
            opened = insist(lambda: h5py.File(self.path, "r", locking="best-effort"))
            with opened as f:
                # Of many parts the plain interface of h5py would take most of the time.
                rows, texts = (h5py.h5d.open(f.id, name) for name in (b"rows", b"texts"))
                rows_at, texts_at = rows.get_offset(), texts.get_offset()
                header = _header(f.id)
                sound = rows.get_type().get_size() == self._size
                sound = sound and header.get("plan") == self._plan
                if sound and rows_at is not None and texts_at is not None:
                    self.header = header
                    return _Place(rows_at, texts_at, int(rows.shape[0]))
        except OSError as e:
            if not insist(self.path.is_file):
                raise LsweepError(f"cannot read {self.path}: {e.strerror or e}") from None
        except Exception:  # so it reports damage too
            pass
        return None

    def _retried(self, source: _Source, place: _Place) -> Iterator[tuple[IntArray, Rows]]:
        size, now = self._size, self._clock()
        for slot, since in list(self._doubts.items()):
            data = source.read(size, place.rows + slot * size)
            if len(data) == size and data[STATUS_AT] and is_valid(data, self._seed):
                del self._doubts[slot]
                self._damaged.discard(slot)
                row = np.frombuffer(data, self._type)
                self._read_texts(source, place, row)
                yield np.array([slot]), row
            elif now - since > DOUBT:
                del self._doubts[slot]

    def _appended(
        self, source: _Source, place: _Place, to_the_end: bool
    ) -> Iterator[tuple[IntArray, Rows]]:
        """Read on; at the first look to the end, for after a power loss there may be holes."""
        size, at = self._size, self._next
        piece = PIECE if to_the_end else FIRST_LOOK
        while at < place.capacity:
            wanted = min(max(1, piece // size), place.capacity - at)
            data = source.read(wanted * size, place.rows + at * size)
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
                    self._read_texts(source, place, rows)
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
            with _Source(self.path) as source:
                self._read_texts(source, self._place)
        return dict(self._texts)

    def _read_texts(self, source: _Source, place: _Place, rows: Rows | None = None) -> None:
        """Read the reasons where one is new; they are written before the rows that need them."""
        if rows is not None and all(n in self._texts for n in set(rows["text"].tolist()) if n):
            return
        data = source.read(TEXTS * TEXT.itemsize, place.texts)
        for i in range(1, len(data) // TEXT.itemsize):
            record = data[i * TEXT.itemsize : (i + 1) * TEXT.itemsize]
            if is_valid(record, self._seed):
                text = np.frombuffer(record, TEXT)[0]["text"]
                self._texts[i] = text.decode(errors="replace")

    def _salvage(self) -> Iterator[tuple[IntArray, Rows]]:
        with _Source(self.path) as source:
            state = source.state()
            if self._scanned == state:
                return
            self._scanned = state
            data = source.read(state[0], 0)
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


def _header(file: h5py.h5f.FileID) -> dict[str, str]:
    """Return the attributes of a part that are texts."""
    header = {}
    for i in range(h5py.h5a.get_num_attrs(file)):
        attribute = h5py.h5a.open(file, index=i)
        kind = attribute.get_type()
        if kind.get_class() == h5py.h5t.STRING:
            value = np.empty((), f"S{kind.get_size()}")
            attribute.read(value)
            header[attribute.name.decode()] = value.tobytes().rstrip(b"\0").decode().strip()
    return header


class _Source:
    """The bytes of a file, opened anew where a shared file system calls the old handle stale.

    Raises:
        LsweepError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, -1

    def __enter__(self) -> _Source:
        with self._one_line():
            insist(self._reopen)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def _reopen(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        self._fd = os.open(self._path, os.O_RDONLY)

    def _try(self, size: int, at: int) -> bytes:
        if self._fd < 0:
            self._reopen()
        try:
            return os.pread(self._fd, size, at)
        except OSError:
            self._reopen()
            raise

    def read(self, size: int, at: int) -> bytes:
        """Return up to ``size`` bytes from ``at``."""
        with self._one_line():
            return insist(lambda: self._try(size, at))

    def state(self) -> tuple[int, int]:
        """Return what changes when the file does: its size and time."""
        with self._one_line():
            stat = insist(lambda: os.fstat(self._fd))
        return stat.st_size, stat.st_mtime_ns

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise LsweepError(f"cannot read {self._path}: {e.strerror}") from None


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

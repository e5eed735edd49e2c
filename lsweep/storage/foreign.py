"""HDF5 files that nobody vouches for: what is wrong with them becomes one line, no surprise."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from lsweep.errors import DamagedFile, LsweepError

_GZIP_LIMIT = 1032  # deflate packs no denser: an array that claims more has a damaged header

_HEAP_LIMIT = 1 << 20  # a heap holds the texts of one file, and HDF5 makes it 4096 bytes


def first_bytes(path: Path, count: int) -> bytes:
    r"""Return how a file begins, which also says whether it can be read at all.

    Raises:
        LsweepError: there is no such file, it is a folder or a device, or it may not be read.

    >>> first_bytes(Path("tests/oracle/filter_1d.surface.h5"), 4)
    b'\x89HDF'
    """
    try:
        if path.is_dir():
            raise LsweepError(f"{path} is a folder: name a file, such as its surface.h5")
        if not path.is_file():
            raise LsweepError(f"no file {path}")
        with path.open("rb") as f:
            return f.read(count)
    except OSError as e:
        raise LsweepError(f"cannot read {path}: {e.strerror}") from None


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; whatever goes wrong inside the block is the file's damage.

    Yields:
        The open file.

    Raises:
        DamagedFile: it is not HDF5 or cut off, or the block met anything unexpected.

    >>> with opened("tests/oracle/filter_1d.surface.h5") as f:
    ...     sorted(f)
    ['dir_file', 'train_acc', 'train_loss', 'xcoordinates']
    """
    p = Path(path)
    first_bytes(p, 1)
    try:
        with h5py.File(p, "r", locking="best-effort") as f:
            yield f
    except LsweepError:
        raise
    except Exception as e:  # HDF5 reports damage as almost any exception
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DamagedFile(f"{p} is damaged or not HDF5: {reason}") from e


def numbers(f: h5py.File, name: str) -> npt.NDArray[Any]:
    """Read an array of numbers that lies in this very file and is no larger than the file can hold.

    Returns:
        Shape and dtype as stored: float, signed or unsigned integer.

    Raises:
        DamagedFile: it is something else, or lies elsewhere.

    >>> with opened("tests/oracle/filter_1d.directions.h5") as f:
    ...     numbers(f, "xdirection/8").shape
    (10,)
    """
    d = _dataset(f, name)
    if d is None or d.dtype.kind not in "fiu" or d.shape is None:
        raise DamagedFile(f"{f.filename}: {name} is not an array of numbers")
    return np.asarray(d[()])


def words(f: h5py.File, name: str) -> str:
    """Read a text that lies in this very file.

    Raises:
        DamagedFile: it is something else, or lies elsewhere.

    >>> with opened("tests/oracle/filter_1d.surface.h5") as f:
    ...     words(f, "dir_file")
    'filter_1d.directions.h5'
    """
    d = _dataset(f, name)
    kind = None if d is None else h5py.check_string_dtype(d.dtype)
    if d is None or kind is None or d.shape != ():
        raise DamagedFile(f"{f.filename}: {name} is not a text")
    return printable(d[()] if kind.length is not None else _heap_text(f, d))


def printable(raw: str | bytes) -> str:
    r"""Return a text from a file or a file system as every terminal and every encoding takes it.

    >>> printable(b"d\xff.h5"), printable("d\n.h5")
    ('d\\xff.h5', 'd\\n.h5')
    """
    decoded = raw.decode(errors="backslashreplace") if isinstance(raw, bytes) else raw
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in decoded)


def _heap_text(f: h5py.File, d: h5py.Dataset) -> bytes:
    """Read a text of variable length without HDF5, which for some damaged heaps never returns.

    The dataset is (length, address, index), the address that of a heap: ``GCOL``, a version, its
    size, and objects (index, references, size, content padded to 8 bytes).
    """
    place = d.id.get_offset()
    if place is None or f.id.get_create_plist().get_sizes() != (8, 8):
        return b""  # never written, or by a library with settings of its own: it is only a name
    with Path(f.filename).open("rb") as g:
        g.seek(place)
        length, address, wanted = struct.unpack("<IQI", g.read(16))
        if not length:
            return b""
        g.seek(f.userblock_size + min(address, Path(f.filename).stat().st_size))
        magic, size = struct.unpack("<4sxxxxQ", g.read(16))
        heap = g.read(min(size, _HEAP_LIMIT))
    at = 0
    while magic == b"GCOL" and at + 16 <= len(heap):
        index, size = struct.unpack_from("<HxxxxxxQ", heap, at)
        if index == wanted and length <= size <= len(heap) - at - 16:
            return heap[at + 16 : at + 16 + length]
        if index in (0, wanted):
            break
        at += 16 + (size + 7) // 8 * 8
    raise DamagedFile(f"{f.filename} is damaged: the text {d.name} points to nothing")


def _dataset(f: h5py.File, name: str) -> h5py.Dataset | None:
    group, _, last = name.rpartition("/")
    d = (f[group] if group else f)[last]
    if not isinstance(d, h5py.Dataset):
        return None
    # A link, a virtual array or external storage would read any file of the user's as data.
    if d.file != f or d.external or d.is_virtual:
        raise DamagedFile(f"{f.filename}: {name} points to another file, which is not followed")
    if d.nbytes > _GZIP_LIMIT * Path(f.filename).stat().st_size:
        raise DamagedFile(f"{f.filename} is damaged: {name} claims {d.nbytes} bytes")
    return d

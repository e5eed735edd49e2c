"""Rows: what a part holds of a point and a slice; each checks itself, and blocks of them fast.

Row: point u64 | slice u32 | kind u8 | status u8 | text u16 | seconds f64 | sums f64[V, 8] |
device u32 | crc u32, where V variables have the eight sums of `sums.SUMS`. The CRC-32 is seeded
with the plan, so that rows of another run never pass.
"""

from __future__ import annotations

import enum
import zlib

import numpy as np
import numpy.typing as npt

from lsweep.storage.sums import SUMS

BLOCK = 8192  # bytes checked at once; over longer ones CRC-32 finds fewer flips for certain
TEXTS = 64  # reasons that a part has room for, and one more
TEXT = np.dtype([("text", "S248"), ("spare", "<u4"), ("crc", "<u4")])
KIND_AT, STATUS_AT = 12, 13  # bytes from the beginning of a row
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


def valid_rows(data: bytes, size: int, seed: int) -> npt.NDArray[np.bool_]:
    """Say of each row in ``data`` whether it passes its checksum.

    After a record and its own CRC the state of CRC-32 no longer depends on the record. So a block
    of valid rows has the CRC of any other block of as many, one call checks it, and only a block
    that fails is taken row by row. Blocks stay so short that any three flipped bits show.

    >>> row = b"row." + zlib.crc32(b"row.", 7).to_bytes(4, "little")
    >>> valid_rows(row + bytes(8) + row, 8, 7)
    array([ True, False,  True])
    """
    view, count, block = memoryview(data), len(data) // size, max(1, BLOCK // size)
    model = bytes(size - 4)
    model += zlib.crc32(model, seed).to_bytes(4, "little")
    whole = zlib.crc32(model * block, seed)
    valid = np.ones(count, dtype=bool)
    for start in range(0, count, block):
        rows = min(block, count - start)
        found = zlib.crc32(view[start * size : (start + rows) * size], seed)
        if found != (whole if rows == block else zlib.crc32(model * rows, seed)):
            valid[start : start + rows] = [
                is_valid(view[at : at + size], seed)
                for at in range(start * size, (start + rows) * size, size)
            ]
    return valid


def device_code(name: str) -> int:
    """Return the 32-bit code by which rows name their device class."""
    return zlib.crc32(name.encode())


def seed_of(plan: str) -> int:
    """Return where the CRC of a record begins."""
    return zlib.crc32(plan.encode())


def is_valid(record: bytes | memoryview, seed: int) -> bool:
    """Return True when the last four bytes of a record are its CRC."""
    return zlib.crc32(record[:-4], seed) == int.from_bytes(record[-4:], "little")

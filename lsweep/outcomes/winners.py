"""Winners: which of several rows stands for a point and slice, and their sums over the slices.

Rows are read twice, once to choose and once to sum, because all sums at once are most of what a
run holds. The best outcome wins, then the first part by name, then the first slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lsweep.outcomes.committed import Committed
from lsweep.outcomes.reading import PartReader
from lsweep.plans.plan import Plan
from lsweep.plans.points import IntArray
from lsweep.plans.rounds import Rounds
from lsweep.storage.folder import RunFolder
from lsweep.storage.rows import Kind, Rows, device_code, row_type
from lsweep.storage.sums import SUMS, WV, W
from lsweep.surfaces.surface import Status

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]
MOST_SUMS = 2**25  # bytes of sums held while slices are added up
PART = 2**32  # a row's number is its part's times this, and its slot


class Winners:
    """The row that stands for each point and slice, by the number under which it was first asked.

    Args:
        folder: the run.
        plan: its plan.
        rounds: its rounds.
        parts: read these only; by default all.

    Attributes:
        committed: what is committed.
        readers: the parts that have rows, in the order of their names.
        row: (points, slices) int64, the number of the winning row, or -1.
        status: (points, slices) uint8, its outcome.
        device: (points, slices) uint32, the code of its device class; known after `totals`.
        again: (points, slices) bool, True where there are more rows than one, audits included.
        seconds: how long all evaluations took.
    """

    def __init__(
        self, folder: RunFolder, plan: Plan, rounds: Rounds, parts: Sequence[Path] | None = None
    ) -> None:
        shape = rounds.total, plan.slices
        self._plan, self._rounds = plan, rounds
        self.committed = Committed(folder, plan, rounds, parts)
        self.readers: list[PartReader] = []
        self.row = np.full(shape, -1, dtype=np.int64)
        self.status = np.zeros(shape, dtype=np.uint8)
        self.device = np.zeros(shape, dtype=np.uint32)
        self.again = np.zeros(shape, dtype=bool)
        self._audits: list[Rows] = []
        self._rivals: list[tuple[IntArray, Rows]] = []
        nanoseconds = 0  # whole numbers, so that the order of parts does not matter
        for reader, slots, rows in self.committed.news():
            if not self.readers or self.readers[-1] is not reader:
                self.readers.append(reader)
            nanoseconds += int(np.rint(rows["seconds"] * 1e9).astype(np.int64).sum())
            audit = rows[rows["kind"] == Kind.AUDIT]
            if len(audit):
                self._audits.append(audit)
                self.again[self._key(audit)] = True
            outcome = np.where(rows["kind"] == Kind.VALUE, rows["status"], Status.PENDING)
            self._choose((len(self.readers) - 1) * PART + slots, *self._key(rows), outcome)
        self.seconds = nanoseconds / 1e9

    def _key(self, rows: Rows) -> tuple[IntArray, IntArray]:
        point = rows["point"].astype(np.int64)
        if self._rounds.asked_again:
            point = self._rounds.first_asked[point]
        return point, rows["slice"].astype(np.int64)

    def _choose(
        self, number: IntArray, point: IntArray, slice_: IntArray, outcome: ByteArray
    ) -> None:
        there = self.status[point, slice_]
        better = np.flatnonzero((outcome > 0) & ((there == 0) | (outcome < there)))
        # What is written last stands: ok is 1, nonfinite 2, failed 3; of equals the first row.
        better = better[::-1]
        if (outcome > Status.OK).any():
            better = better[np.argsort(-outcome[better].astype(np.int64), kind="stable")]
        key = point[better], slice_[better]
        self.row[key], self.status[key] = number[better], outcome[better]
        beaten = (outcome > 0) & ((there > 0) | (self.row[point, slice_] != number))
        if beaten.any():
            self.again[point[beaten], slice_[beaten]] = True

    def pieces(self, part: int) -> Iterator[tuple[IntArray, IntArray, Rows, BoolArray]]:
        """Yield a part's rows once more: point, slice, row, whether it won."""
        for slots, rows in self.readers[part].again():
            known = (rows["point"] < self._rounds.total) & (rows["slice"] < self._plan.slices)
            if not known.all():
                slots, rows = slots[known], rows[known]
            point, slice_ = self._key(rows)
            yield point, slice_, rows, self.row[point, slice_] == part * PART + slots

    def totals(self) -> Iterator[tuple[IntArray, FloatArray]]:
        """Yield numbers of points, each once, and their (n, V, 8) sums over all slices.

        Slices are added in their order, so that cutting the data changes nothing. A point with a
        slice that is missing has NaN, or is not among them.
        """
        if self._plan.slices == 1:
            for part in range(len(self.readers)):
                for point, _, rows in self._winning(part, 0, self._rounds.total):
                    yield point, rows["sums"]
            return
        variables, slices = len(self._plan.variables), self._plan.slices
        size = max(1, MOST_SUMS // (slices * variables * len(SUMS) * 8))
        for start in range(0, self._rounds.total, size):
            stop = min(start + size, self._rounds.total)
            sums = np.full((stop - start, slices, variables, len(SUMS)), np.nan)
            for part in np.unique(self.row[start:stop] // PART).tolist():
                for point, slice_, rows in self._winning(part, start, stop) if part >= 0 else ():
                    sums[point - start, slice_] = rows["sums"]
            total = sums[:, 0]
            for s in range(1, slices):
                total = total + sums[:, s]
            yield np.arange(start, stop), total

    def _winning(
        self, part: int, start: int, stop: int
    ) -> Iterator[tuple[IntArray, IntArray, Rows]]:
        """Yield the winning rows of points from ``start`` to ``stop``; set rivals aside."""
        for point, slice_, rows, won in self.pieces(part):
            within = (point >= start) & (point < stop)
            rival = within & self.again[point, slice_] & (rows["kind"] == Kind.VALUE)
            if rival.any():
                key = point[rival] * self._plan.slices + slice_[rival]
                sizes = device_code(self.readers[part].header.get("batch_sizes", ""))
                maker = np.full(len(key), sizes), rows["device"][rival].astype(np.int64)
                self._rivals.append((np.stack([key, won[rival], *maker]), rows[rival]))
            won &= within
            if not won.all():
                point, slice_, rows = point[won], slice_[won], rows[won]
            self.device[point, slice_] = rows["device"]
            yield point, slice_, rows

    def _collected(self) -> tuple[IntArray, BoolArray, IntArray, Rows]:
        """Return the rivals that were set aside: key, won, (2, n) batch sizes and class, row."""
        if not self._rivals:
            nothing = np.empty((2, 0), dtype=np.int64)
            return nothing[0], nothing[0] > 0, nothing, np.empty(0, self._row_type())
        key, won, *maker = np.concatenate([facts for facts, _ in self._rivals], axis=1)
        return key, won > 0, np.stack(maker), np.concatenate([rows for _, rows in self._rivals])

    def conflicts(self, tolerance: float) -> int:
        """Return how many points have rows that disagree; to be asked after `totals`.

        Rows of one device class and batch sizes must be equal bit for bit, others to a relative
        ``tolerance``.
        """
        key, won, maker, rows = self._collected()
        finite = rows["status"] < Status.FAILED
        first, rest = np.flatnonzero(won & finite), np.flatnonzero(~won & finite)
        winner = _lookup(key[first], key[rest])
        rest, first = rest[winner >= 0], first[winner[winner >= 0]]
        a, b = rows["sums"][first], rows["sums"][rest]
        identical = ((a == b) | (np.isnan(a) & np.isnan(b))).all(axis=(1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            x, y = a[..., WV] / a[..., W], b[..., WV] / b[..., W]
        close = np.isclose(x, y, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)
        same = (maker[:, first] == maker[:, rest]).all(axis=0)
        agree = np.where(same, identical, close.all(axis=1))
        return len(np.unique(key[rest][~agree] // self._plan.slices))

    def audits(self) -> tuple[Rows, Rows]:
        """Return rows that won, and those that audit them; to be asked after `totals`."""
        key, won, _, rows = self._collected()
        audits = np.concatenate(self._audits) if self._audits else np.empty(0, self._row_type())
        point, slice_ = self._key(audits)
        winner = _lookup(key[won], point * self._plan.slices + slice_)
        return rows[won][winner[winner >= 0]], audits[winner >= 0]

    def _row_type(self) -> np.dtype[np.void]:
        return row_type(len(self._plan.variables))


def _lookup(keys: IntArray, wanted: IntArray) -> IntArray:
    """Return for each wanted key its index in ``keys``, or -1."""
    if not len(keys):
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    found = order[np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)]
    return np.where(keys[found] == wanted, found, -1)

"""What is committed: the outcome of every point and slice, and what was appended since a look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.outcomes.reading import PartReader
from lsweep.plans.plan import Plan
from lsweep.plans.points import IntArray
from lsweep.plans.rounds import Round, Rounds
from lsweep.storage.folder import RunFolder
from lsweep.storage.rows import Kind, Rows
from lsweep.surfaces.surface import Status

Piece = tuple[PartReader, IntArray, Rows]


class Committed:
    """What the parts of a run hold, as far as was looked; safe while workers write.

    Args:
        folder: the run.
        plan: its plan.
        rounds: its rounds.
        parts: look at these only; by default at all there are, new ones too.

    Attributes:
        status: (points, slices) uint8, `Status` of the best value row of each number; 0 where
            there is none.
    """

    def __init__(
        self, folder: RunFolder, plan: Plan, rounds: Rounds, parts: Sequence[Path] | None = None
    ) -> None:
        self._folder, self._plan, self._rounds, self._parts = folder, plan, rounds, parts
        self.status = np.zeros((rounds.total, plan.slices), dtype=np.uint8)
        self._digest = plan.digest
        self._readers: dict[str, PartReader] = {}
        self._early: list[Piece] = []  # rows of rounds that were published after these
        self._reasons: dict[str, int] = {}
        self._reason = np.zeros(0, dtype=np.int32)  # by number; empty while nothing failed

    @classmethod
    def read(cls, folder: RunFolder, plan: Plan, rounds: Rounds) -> Committed:
        """Look at every part."""
        committed = cls(folder, plan, rounds)
        committed.look()
        return committed

    @property
    def readers(self) -> list[PartReader]:
        """The parts that were looked at, by name."""
        return [self._readers[name] for name in sorted(self._readers)]

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """(points, slices) bool, True where a valid row exists."""
        return self.status > 0

    @property
    def share(self) -> tuple[int, int]:
        """How many required points, times slices, are done, and how many there are."""
        required = self._rounds.required
        return int(np.count_nonzero(self.status[required])), int(required.sum()) * self._plan.slices

    @property
    def complete(self) -> bool:
        """True when no required point is missing and no later round will ask for more."""
        done, total = self.share
        return done == total and not self._rounds.refining

    def look(self, rounds: Rounds | None = None) -> None:
        """Read what was appended since the last look, at first everything.

        Args:
            rounds: the rounds, where there are more than before.
        """
        for _ in self.news(rounds):
            pass

    def news(self, rounds: Rounds | None = None) -> Iterator[Piece]:
        """Look, and yield the rows that were found, with their part and slots, audits too."""
        pieces = self._appended()
        if rounds is not None and len(rounds.all) > len(self._rounds.all):
            more = rounds.total - self._rounds.total
            self.status = np.pad(self.status, ((0, more), (0, 0)))
            if self._reason.size:
                self._reason = np.pad(self._reason, (0, more))
            self._rounds, early, self._early = rounds, self._early, []
            yield from self._known(iter(early))
        yield from self._known(pieces)

    def _appended(self) -> Iterator[Piece]:
        pruned = False
        for path in self._folder.all_parts() if self._parts is None else self._parts:
            reader = self._readers.get(path.name)
            if reader is None:
                reader = PartReader(path, self._digest, len(self._plan.variables))
                self._readers[path.name] = reader
            try:
                for slots, rows in reader.news():
                    yield reader, slots, rows
            except LsweepError:
                if path.exists():
                    raise
                del self._readers[path.name]
                pruned = True
        if pruned:  # meanwhile: what those held is in a part that was not yet listed
            yield from self._appended()

    def _known(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for reader, slots, rows in pieces:
            within = rows["slice"] < self._plan.slices
            early = within & (rows["point"] >= self._rounds.total)
            if early.any():
                self._early.append((reader, slots[early], rows[early]))
                within &= ~early
            if not within.all():
                slots, rows = slots[within], rows[within]
            self._record(reader, rows)
            yield reader, slots, rows

    def _record(self, reader: PartReader, rows: Rows) -> None:
        point, slice_ = rows["point"].astype(np.int64), rows["slice"]
        outcome = np.where(rows["kind"] == Kind.VALUE, rows["status"], Status.PENDING)
        # The best outcome is written last, and so it stands: ok is 1, nonfinite 2, failed 3.
        for status in (Status.FAILED, Status.NONFINITE, Status.OK):
            at = np.flatnonzero(outcome == status)
            if not len(at):
                continue
            key = point[at], slice_[at]
            before = self.status[key]
            self.status[key] = np.where(before > 0, np.minimum(before, status), status)
            if status == Status.FAILED:
                self._record_reasons(reader, key[0], rows["text"][at])

    def _record_reasons(self, reader: PartReader, point: IntArray, text: IntArray) -> None:
        if not self._reason.size:
            self._reason = np.zeros(self._rounds.total, dtype=np.int32)
        for number in np.unique(text).tolist():
            code = self._reasons.setdefault(reader.reason(number), len(self._reasons) + 1)
            here = point[text == number]
            self._reason[here[self._reason[here] == 0]] = code

    def standing(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
        """Return the outcome by the number under which each point was first asked.

        Returns:
            (points, slices) `Status`, and (points,) the last reason for failing as an index into
            `reasons`.
        """
        status, reason = self.status, self._reason
        if not reason.size:
            reason = np.zeros(self._rounds.total, dtype=np.int32)
        if not self._rounds.asked_again:
            return status, reason
        first = self._rounds.first_asked
        best = np.full_like(status, 255)
        np.minimum.at(best, first, np.where(status > 0, status, 255))
        best[best == 255] = Status.PENDING
        failed = np.flatnonzero(reason)
        standing = np.zeros_like(reason)
        standing[first[failed]] = reason[failed]
        return best, standing

    @property
    def reasons(self) -> list[str]:
        """Why points failed; the first is for those whose reason is lost."""
        return ["reason not recorded", *self._reasons]

    @property
    def damage(self) -> dict[str, str]:
        """What is wrong with parts, by name."""
        found = {}
        for reader in self.readers:
            if reader.salvaged is not None:
                text = f"HDF5 cannot open it; {reader.salvaged} rows were salvaged"
                found[reader.path.name] = text
            elif reader.damaged:
                text = f"{reader.damaged} rows fail their checksum; they count as not computed"
                found[reader.path.name] = text
        return found

    # -- what is left ------------------------------------------------------------------------------

    def missing(self, round_: Round, unit: int, slices: int) -> list[int]:
        """Return the point numbers of a unit that have no row yet."""
        points, slice_ = round_.unit(unit, slices)
        pending = self.status[points.start : points.stop, slice_] == Status.PENDING
        found: list[int] = (points.start + np.flatnonzero(pending)).tolist()
        return found

    def first_missing(self, round_: Round, optional: bool = False) -> IntArray:
        """Return for each lease of a round its first point that has no row yet, or -1.

        Args:
            round_: the round.
            optional: count also points that are not required.
        """
        slices, size = self._plan.slices, round_.unit_points
        units, leases = round_.units(slices), round_.leases(slices)
        if not leases:
            return np.empty(0, dtype=np.int64)
        here = self.status[round_.first : round_.first + round_.points]
        pending = np.zeros((units // slices * size, slices), dtype=bool)
        np.equal(here, Status.PENDING, out=pending[: len(here)])
        if not optional:
            required = self._rounds.required[round_.first : round_.first + round_.points]
            pending[: len(here)] &= required[:, None]
        by_unit = pending.reshape(-1, size, slices)
        first = round_.first + size * np.arange(len(by_unit))[:, None] + by_unit.argmax(axis=1)
        of_units = np.full(leases * round_.lease_units, -1, dtype=np.int64)
        of_units[:units] = np.where(by_unit.any(axis=1), first, -1).ravel()
        by_lease = of_units.reshape(leases, -1)
        found: IntArray = by_lease[np.arange(leases), (by_lease >= 0).argmax(axis=1)]
        return found


def read_run(folder: RunFolder) -> tuple[Plan, Rounds, Committed]:
    """Read all that a run is: its plan, its rounds, and what is committed."""
    plan = Plan.read(folder)
    rounds = Rounds.read(folder, plan)
    return plan, rounds, Committed.read(folder, plan, rounds)

"""Prune: the rows of a merged run in as few parts as can be, and no leases or ended workers.

Every row that counts is kept, audits and second evaluations too, so that the run can go on as any
other. New parts are written, synced and merged on their own before anything is removed; a crash at
any moment leaves rows twice, never none. Winners come before the rows that they beat: so they win
again.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lsweep.errors import LsweepError
from lsweep.merging.merge import merge
from lsweep.outcomes.committed import Committed
from lsweep.outcomes.reading import PartReader
from lsweep.outcomes.winners import PART, Winners
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.runs.status import is_complete, worker_states
from lsweep.storage.files import sync_folder, writing
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import discard
from lsweep.storage.parts import PartWriter
from lsweep.storage.rows import TEXTS, Rows
from lsweep.storage.workers import Observer, State
from lsweep.surfaces.differing import difference
from lsweep.surfaces.surface import Surface

Header = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Copy:
    """What a new part is to hold: its header, how many rows, and these with where they stand."""

    header: Header
    count: int
    rows: Iterator[tuple[PartReader, Rows]]


@dataclass(frozen=True)
class Pruned:
    """What pruning did: parts before and after, files and bytes that it freed."""

    before: int
    after: int
    files: int
    bytes: int


def prune(folder: RunFolder) -> Pruned:
    """Rewrite the rows of a merged run into few parts and remove what they came from.

    Raises:
        LsweepError: someone works on it, points are missing, or surface.h5 is not what a merge
            gives; nothing was changed.
    """
    gone = folder.all_workers()  # listed before: who comes later stays
    _refuse_living(folder)
    plan = Plan.read(folder)
    rounds = Rounds.read(folder, plan)
    winners = Winners(folder, plan, rounds)
    if not winners.committed.complete:
        done, total = winners.committed.share
        what = f"{total - done} points are missing" if done < total else "its refinement is open"
        raise LsweepError(f"{folder.root}: {what}: 'lsweep run' it first")
    surface = Surface.load(folder.surface)
    if difference(surface, merge(folder)[0]):
        raise LsweepError(f"{folder.surface} is not what the parts give: 'lsweep merge' it first")
    # What holds no row of this plan is not ours to remove.
    old = [reader.path for reader in winners.committed.readers if reader.salvaged != 0]
    new: list[Path] = []
    copies = _copies(winners)
    if len(copies) >= len(old):
        old, copies = [], []
    try:
        with writing(folder.parts):
            _write(folder, plan, copies, new)
        if copies:
            rows = sum(copy.count for copy in copies)
            _require_same(folder, plan, rounds, winners, surface, new, rows)
        _refuse_living(folder)
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise
    gone += old
    gone += folder.all_leases()
    size = sum(path.stat().st_size for path in gone) - sum(p.stat().st_size for p in new)
    for path in gone:
        path.unlink(missing_ok=True)
    for round_ in rounds:
        shutil.rmtree(folder.lease_folder(round_.number, 0).parent, ignore_errors=True)
    sync_folder(folder.parts)
    return Pruned(len(old), len(new), len(gone) - len(new), size)


def forget_leases(folder: RunFolder) -> None:
    """Remove the leases of a run that is complete: thousands of files, where units are dear.

    A lease steers who takes what is missing, and nothing is; who looks at an old listing still
    computes a unit twice at worst. Folders stay, for somebody may be about to claim in a new round.
    Nothing happens while something is missing, or where the disk does not let go.
    """
    if is_complete(folder):
        with contextlib.suppress(OSError):
            for path in folder.all_leases():
                discard(path)


def _require_same(
    folder: RunFolder,
    plan: Plan,
    rounds: Rounds,
    winners: Winners,
    surface: Surface,
    new: list[Path],
    rows: int,
) -> None:
    """Read the new parts, and them alone: they must hold and give the same."""
    held = Committed(folder, plan, rounds, new)
    found = sum(len(piece) for _, _, piece in held.news())
    same = found == rows and np.array_equal(held.status, winners.committed.status)
    wrong = difference(surface, merge(folder, new)[0])
    if wrong or not same:
        raise LsweepError(
            f"{folder.root}: rewritten parts give another {wrong or 'outcome'}: the old ones stay"
        )


def _refuse_living(folder: RunFolder) -> None:
    states, _ = worker_states(folder, Observer(folder))
    alive = [w for w in states if w["state"] == State.WORKING]
    if alive:
        more = f" and {len(alive) - 1} more" if len(alive) > 1 else ""
        raise LsweepError(
            f"{folder.root}: {alive[0]['worker']} on {alive[0]['host']}{more} may be at work on "
            "it: wait until it has ended, or stop it"
        )


# -- rewriting -------------------------------------------------------------------------------------


def _copies(winners: Winners) -> list[Copy]:
    """Return what each new part is to hold; rows of one device class can share one."""
    alike: dict[Header, list[int]] = {}
    for part, reader in enumerate(winners.readers):
        alike.setdefault(_header(reader), []).append(part)
    won = np.bincount(winners.row[winners.row >= 0] // PART, minlength=len(winners.readers))
    first = [
        Copy(header, int(won[parts].sum()), _winning(winners, parts))
        for header, parts in alike.items()
    ]
    then = []
    for header, parts in alike.items():
        pieces = _spare(winners, parts)
        then.append(Copy(header, sum(len(rows) for _, rows in pieces), iter(pieces)))
    if len(alike) == 1:
        rows = itertools.chain(first[0].rows, then[0].rows)
        return [Copy(first[0].header, first[0].count + then[0].count, rows)]
    return [copy for copy in first + then if copy.count]


def _write(folder: RunFolder, plan: Plan, copies: list[Copy], new: list[Path]) -> None:
    """Write new parts; ``new`` is told of each before it exists."""
    name = f"pruned-{uuid.uuid4().hex[:12]}"
    for copy in copies:
        writer, left = None, copy.count
        for reader, piece in copy.rows:
            rows = piece.copy()
            if writer is None or not _translate(rows, reader, writer):
                if writer is not None:  # it has no room for another reason
                    writer.sync()
                    writer.close()
                new.append(folder.part(name, len(new)))
                writer = PartWriter(
                    new[-1],
                    plan=plan.digest,
                    variables=len(plan.variables),
                    capacity=left,
                    header={"worker": name, **dict(copy.header)},
                )
                _translate(rows, reader, writer)
            writer.append(rows)
            left -= len(rows)
        if writer is not None:
            writer.sync()
            writer.close()


def _header(reader: PartReader) -> Header:
    """What rows of a part have in common, and must have in common with those they are put to."""
    return tuple(sorted((k, v) for k, v in reader.header.items() if k not in ("plan", "worker")))


def _winning(winners: Winners, parts: Iterable[int]) -> Iterator[tuple[PartReader, Rows]]:
    for part in parts:
        for _, _, rows, won in winners.pieces(part):
            if won.any():
                yield winners.readers[part], rows[won]


def _spare(winners: Winners, parts: Iterable[int]) -> list[tuple[PartReader, Rows]]:
    """Return the rows that did not win: audits, and what was evaluated twice.

    What stands there twice to the last bit was copied, by a prune that was killed, and is dropped.
    """
    kept: set[bytes] = set()
    beaten: list[tuple[bytes, PartReader, Rows]] = []
    for part in parts:
        reader = winners.readers[part]
        for point, slice_, rows, won in winners.pieces(part):
            for i in np.flatnonzero(winners.again[point, slice_]).tolist():
                row = rows[i : i + 1]
                bare = row.copy()
                bare["text"] = bare["crc"] = 0
                mark = bare.tobytes() + reader.reason(int(row["text"][0])).encode()
                if won[i]:
                    kept.add(mark)
                else:
                    beaten.append((mark, reader, row))
    found = []
    for mark, reader, row in beaten:
        if mark not in kept:
            kept.add(mark)
            found.append((reader, row))
    return found


def _translate(rows: Rows, reader: PartReader, writer: PartWriter) -> bool:
    """Give rows the numbers that their reasons have in another part; False when it has no room."""
    texts = reader.texts()
    numbers = np.zeros(TEXTS, dtype=np.uint16)
    for number in np.unique(rows["text"]).tolist():
        if number in texts:
            numbers[number] = writer.note(texts[number])
            if not numbers[number]:
                return False
    rows["text"] = numbers[rows["text"]]
    return True

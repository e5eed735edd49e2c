"""Leases: the claim of a worker to a run of units, a hint that steers and never the truth.

A lease is a file whose name holds a generation; it is made by link(2), so that exactly one claim
of a generation wins, and never changed or removed. To take over from a dead owner is to claim the
next generation: unlink and create would hand one unit to two thieves.

How many units a lease covers is agreed on by the workers of a round, first wins. Its name is its
first unit, which whoever holds it does: so nobody waits for ever for one who, after the agreement
was lost, covers less.
"""

from __future__ import annotations

from dataclasses import dataclass

from lsweep.errors import LsweepError
from lsweep.storage.files import publish, read_json, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import names, there

DEATHS_UNTIL_SINGLE = 3
KILLS_UNTIL_FAILED = 2


@dataclass(frozen=True)
class Lease:
    """One generation of a claim.

    Attributes:
        worker: who holds it; "" when the file cannot be read.
        generation: 0 for the first claim, one more for each that took over.
        deaths: how many owners of earlier generations died with it.
        suspect: the first point that was missing when it was claimed.
        kills: how many workers in a row died with the suspect alone, point by point.
    """

    worker: str
    generation: int
    deaths: int = 0
    suspect: int = -1
    kills: int = 0

    @property
    def single(self) -> bool:
        """True when the points are to be taken one by one, because owners keep dying."""
        return self.deaths >= DEATHS_UNTIL_SINGLE

    @property
    def poisoned(self) -> bool:
        """True when the suspect has killed often enough to be called failed."""
        return self.kills >= KILLS_UNTIL_FAILED

    def next(self, worker: str, suspect: int, died: bool) -> Lease:
        """Return the claim that would follow this one.

        >>> lease = Lease("a", 4, deaths=3, suspect=7)
        >>> lease.next("b", 7, died=True).kills, lease.next("b", 8, died=True).kills
        (1, 0)
        """
        killed = died and self.single and suspect == self.suspect
        return Lease(
            worker,
            self.generation + 1,
            self.deaths + died,
            suspect,
            self.kills + 1 if killed else 0,
        )


def agreed(folder: RunFolder, round_: int, wanted: int) -> int | None:
    """Return how many units each lease of a round covers: what the first who asked wanted.

    None where that cannot be read.
    """
    path = folder.lease_size(round_)
    if not there(path):
        publish(path, sealed({"units": wanted}))
    try:
        return max(1, int(read_json(path)["units"]))
    except (LsweepError, KeyError, TypeError, ValueError):
        return None


def newest(folder: RunFolder, round_: int, unit: int) -> Lease | None:
    """Return the newest generation of a lease, or None when nobody has claimed it."""
    generation = -1
    # A generation seen late costs a claim that loses.
    while there(folder.lease(round_, unit, generation + 1)):
        generation += 1
    if generation < 0:
        return None
    try:
        value = read_json(folder.lease(round_, unit, generation))
        return Lease(
            str(value["worker"]),
            generation,
            int(value["deaths"]),
            int(value["suspect"]),
            int(value["kills"]),
        )
    except (LsweepError, KeyError, TypeError, ValueError):
        return Lease("", generation)  # damaged: whoever held it cannot be asked, so it is free


def claim(folder: RunFolder, round_: int, unit: int, lease: Lease) -> bool:
    """Claim a generation; True for exactly one caller."""
    value = {
        "worker": lease.worker,
        "deaths": lease.deaths,
        "suspect": lease.suspect,
        "kills": lease.kills,
    }
    path = folder.lease(round_, unit, lease.generation)
    return publish(path, sealed(value), sync=False)


def unclaimed(folder: RunFolder, round_: int, units: range) -> set[int]:
    """Return the first units of leases that nobody has claimed, from one listing."""
    taken = set()
    round_folder = folder.lease_folder(round_, 0).parent
    for sub in names(round_folder):
        taken |= {int(n[:-3]) for n in names(round_folder / sub) if n.endswith(".g0")}
    return set(units) - taken

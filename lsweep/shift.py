"""The shift: which lease a worker takes next, until no round has a missing point.

First its own shard, coarse to fine. Then what nobody has claimed, from the far ends of the others'
shards, for their owners come from the near ones. Then the leases of owners that are gone: while
others still work some workers stand by for that, asleep most of the time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Iterator

import numpy as np

from lsweep import leases
from lsweep.committed import Committed
from lsweep.folder import RunFolder
from lsweep.leases import Lease
from lsweep.plan import Plan
from lsweep.points import IntArray
from lsweep.role import Role
from lsweep.rounds import Round, Rounds
from lsweep.stopping import Stop
from lsweep.workers import Observer, Verdict

STANDING_BY = 64  # of a crowd so many wait for deaths; the others free their devices
EXAMINED = 16  # leases that one look of an idle worker examines
SHORTEST_NAP, LONGEST_NAP = 0.05, 2.0  # seconds between looks of an idle worker
WORKERS_A_SECOND = 100  # so many lengthen the longest nap by a second
Claimed = tuple[Round, int, Lease | None]


class Shift:
    """One worker's way through the rounds.

    Args:
        folder: the run.
        plan: its plan.
        role: the worker's share.
        name: under which it claims.
        stop: asked before every nap.

    Attributes:
        rounds: the rounds that it knows.
        committed: what is committed, as far as it has looked.
    """

    def __init__(self, folder: RunFolder, plan: Plan, role: Role, name: str, stop: Stop) -> None:
        self._folder, self._plan, self._role = folder, plan, role
        self._name, self._stop = name, stop
        self._observer = Observer(folder)
        self._chance = random.Random(name)  # when to look again and where, never what to compute
        self.rounds = Rounds.read(folder, plan)
        self.committed = Committed.read(folder, plan, self.rounds)

    @property
    def complete(self) -> bool:
        """True when nothing was missing at the last look."""
        return bool(self.committed.done.all())

    def leases(self) -> Iterator[Claimed]:
        """Yield (round, number, lease) of what is now this worker's to do; the lease may be None.

        Each is to be done before the next is asked for.
        """
        while True:
            for round_ in self.rounds:
                if self._role.claims == "static":
                    for number in self._own(np.arange(round_.leases(self._plan.slices))):
                        yield round_, number, None
                    continue
                yield from self._unclaimed(round_)
                finished = yield from self._left(round_)
                if not finished:
                    return
            fresh = Rounds.read(self._folder, self._plan)
            if fresh.total == self.rounds.total:
                return
            self.rounds = fresh
            self.committed.look(fresh)

    def _own(self, numbers: IntArray) -> list[int]:
        own: list[int] = numbers[numbers % self._role.of == self._role.index].tolist()
        return own

    # -- what nobody has claimed -------------------------------------------------------------------

    def _unclaimed(self, round_: Round) -> Iterator[Claimed]:
        first = self.committed.first_missing(round_)
        missing = np.flatnonzero(first >= 0)
        own = self._own(missing)
        others = sorted(
            set(missing.tolist()).difference(own),
            # Each shard has one lease in every stretch of ``of``; thieves spread over the shards.
            key=lambda n: (-(n // self._role.of), self._chance.random()),
        )
        free = leases.unclaimed(self._folder, round_.number, len(first))
        for number in (*own, *others):
            if number not in free:
                continue
            lease = Lease(self._name, 0, suspect=int(first[number]))
            if leases.claim(self._folder, round_.number, number, lease):
                yield round_, number, lease
            else:  # someone was faster, and surely not only here
                free = leases.unclaimed(self._folder, round_.number, len(first))

    # -- what others left --------------------------------------------------------------------------

    def _left(self, round_: Round) -> Generator[Claimed, None, bool]:
        """Yield what owners that are gone left; return True when the round is complete."""
        nap, longest = SHORTEST_NAP, LONGEST_NAP + self._role.of / WORKERS_A_SECOND
        while True:
            self.committed.look()
            left = np.flatnonzero(self.committed.first_missing(round_) >= 0).tolist()
            if not left:
                return True
            if not self._stands_by and not leases.unclaimed(
                self._folder, round_.number, round_.leases(self._plan.slices)
            ).intersection(left):
                return False
            found = False
            for number in self._chance.sample(left, min(EXAMINED, len(left))):
                lease = self._next(round_, number)
                if lease and leases.claim(self._folder, round_.number, number, lease):
                    found = True
                    yield round_, number, lease
            if found:
                nap = SHORTEST_NAP
                continue
            self._stop.check()
            time.sleep(nap * self._chance.uniform(0.5, 1.0))
            nap = min(longest, nap * 1.5)

    @property
    def _stands_by(self) -> bool:
        return self._role.index % -(-self._role.of // STANDING_BY) == 0

    def _next(self, round_: Round, number: int) -> Lease | None:
        """Return the claim that would take a lease over, or None while its owner is there."""
        last = leases.newest(self._folder, round_.number, number)
        verdict = Verdict.ENDED
        # An earlier lease of its own, lost on a damaged part, is free too.
        if last is not None and last.worker != self._name:
            verdict = self._observer.verdict(last.worker)
            if verdict is Verdict.ALIVE:
                return None
        # Its owner may have committed more since this worker last looked.
        self.committed.look()
        suspect = int(self.committed.first_missing(round_)[number])
        if suspect < 0:
            return None
        if last is None:
            return Lease(self._name, 0, suspect=suspect)
        return last.next(self._name, suspect, verdict is Verdict.DIED)

"""The shift: which lease a worker takes next, until no round has a missing point.

First its own shard, coarse to fine. Then what nobody has claimed, from the far ends of the others'
shards, for their owners come from the near ones. Then the leases of owners that are gone: while
others still work some workers stand by for that, asleep most of the time. Where a refinement is
open they all stay, those of a crowd looking at little but whether a new round is there: they
evaluate ahead what the next will probably ask, and who finds the last one complete plans the next.

Cheap units share a lease: whoever comes first to a round decides how many, by what a point takes.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Generator, Iterator

import numpy as np

from lsweep.hosts.stopping import Stop
from lsweep.outcomes.committed import Committed
from lsweep.plans.plan import Plan
from lsweep.plans.points import IntArray
from lsweep.plans.rounds import Round, Rounds
from lsweep.refinement.audit import Sampler
from lsweep.refinement.refining import plan_next
from lsweep.storage import leases
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import names
from lsweep.storage.leases import Lease
from lsweep.storage.workers import Observer, State, Verdict, all_workers
from lsweep.working.role import Role

STANDING_BY = 64  # of a crowd so many wait for deaths; the others free their devices
EXAMINED = 16  # leases that one look of an idle worker examines
SHORTEST_NAP, LONGEST_NAP = 0.05, 2.0  # seconds between looks of an idle worker
WORKERS_A_SECOND = 100  # so many lengthen the longest nap by a second
SELDOM = 16  # times longer naps of those that stay without standing by
QUIET = 60.0  # seconds without a sign of the others after which their shards are not waited for
LEASE = 5.0  # seconds that a lease of cheap units takes, about
LEAST_LEASES, LEASES_A_WORKER = 64, 16  # however cheap, so that all have work to the end
TURN, LAST_TURN = 0.05, 10.0  # seconds that each worker lets those before it plan a round
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
        self._sampler: Sampler | None = None
        self._chance = random.Random(name)  # when to look again and where, never what to compute
        self.rounds = Rounds.read(folder, plan)
        self.committed = Committed.read(folder, plan, self.rounds)

    def open(self) -> bool:
        """Whether something is left to evaluate or, with the network at hand, to plan."""
        while self.committed.share[0] == self.committed.share[1] and not self.rounds.refining:
            if not self._went_on():
                return False
        return True

    def leases(self, sampler: Sampler | None = None, seconds: float = 0.0) -> Iterator[Claimed]:
        """Yield (round, number, lease) of what is now this worker's to do; the lease may be None.

        Each is to be done before the next is asked for.

        Args:
            sampler: by which a refinement is audited that this worker finds done.
            seconds: that a point takes, about; 0 where that is not known.
        """
        self._sampler, going = sampler, True
        while going:
            if self._role.claims != "static":
                self.rounds.all[:] = [self._cut(r, seconds) for r in self.rounds]
            if self._role.claims == "static":
                for round_ in self.rounds:
                    left = np.flatnonzero(self.committed.first_missing(round_) >= 0)
                    for number in self._own(left):
                        yield round_, number, None
                if self.rounds.refining and not self._others_are_done():
                    return
            else:
                for round_ in self.rounds:
                    yield from self._unclaimed(round_)
                finished = yield from self._left()
                if not finished:
                    return
            going = self._went_on()

    def _cut(self, round_: Round, seconds: float) -> Round:
        """Return a round with leases of as many units as its workers agree on."""
        units, size = round_.units(self._plan.slices), round_.lease_units
        # Few stay as they were published, and so do those that chance takes one by one.
        if round_.likely or units < 2 * LEAST_LEASES * size:
            return round_
        most = units // max(LEAST_LEASES, LEASES_A_WORKER * self._role.of)
        wanted = int(min(most, LEASE * units / (seconds * round_.points))) if seconds else size
        found = leases.agreed(self._folder, round_.number, max(size, wanted))
        return dataclasses.replace(round_, lease_units=found or size)

    def _claims(self, round_: Round, number: int, lease: Lease) -> bool:
        """Claim a lease by the name of its first unit; True for exactly one worker."""
        unit = round_.lease_range(number, self._plan.slices).start
        return leases.claim(self._folder, round_.number, unit, lease)

    def _unclaimed_of(self, round_: Round) -> set[int]:
        """Return the leases of a round that nobody has claimed."""
        units = range(0, round_.units(self._plan.slices), round_.lease_units)
        free = leases.unclaimed(self._folder, round_.number, units)
        return {unit // round_.lease_units for unit in free}

    def _went_on(self) -> bool:
        """Learn of later rounds, or plan the next where one is due; False when there is none."""
        known, since = len(self.rounds.all), time.monotonic()
        wait = min(LAST_TURN, TURN * self._role.index)
        while True:
            fresh = Rounds.read(self._folder, self._plan)
            due = len(fresh.all) == known and fresh.refining
            if not due or time.monotonic() - since >= wait:
                break
            self._stop.check()
            time.sleep(TURN)
        if due:
            fresh = plan_next(self._folder, self._plan, fresh, self._sampler)
        if len(fresh.all) == known:
            return False
        self.rounds = fresh
        self.committed.look(fresh)
        return True

    def _others_are_done(self) -> bool:
        """Wait until the others' shards are complete; False when nobody is at them any more."""
        since, before, nap = time.monotonic(), -1, SHORTEST_NAP
        while True:
            self.committed.look()
            done, total = self.committed.share
            if done == total:
                return True
            others = [w for w in all_workers(self._folder) if w["worker"] != self._name]
            working = [w["worker"] for w in others if w["state"] == State.WORKING]
            alive = any(self._observer.verdict(w) is Verdict.ALIVE for w in working)
            if alive or done != before:
                since, before = time.monotonic(), done
            if time.monotonic() - since > QUIET:
                return False
            self._stop.check()
            time.sleep(nap)
            nap = min(LONGEST_NAP, nap * 1.5)

    def _own(self, numbers: IntArray) -> list[int]:
        own: list[int] = numbers[numbers % self._role.of == self._role.index].tolist()
        return own

    # -- what nobody has claimed -------------------------------------------------------------------

    def _unclaimed(self, round_: Round) -> Iterator[Claimed]:
        first = self.committed.first_missing(round_)
        missing = np.flatnonzero(first >= 0)
        if not len(missing):
            return
        own = self._own(missing)
        others = sorted(
            set(missing.tolist()).difference(own),
            # Each shard has one lease in every stretch of ``of``; thieves spread over the shards.
            key=lambda n: (-(n // self._role.of), self._chance.random()),
        )
        free = self._unclaimed_of(round_)
        for number in (*own, *others):
            if number not in free:
                continue
            lease = Lease(self._name, 0, suspect=int(first[number]))
            if self._claims(round_, number, lease):
                yield round_, number, lease
            else:  # someone was faster, and surely not only here
                free = self._unclaimed_of(round_)

    # -- what others left --------------------------------------------------------------------------

    def _left(self) -> Generator[Claimed, None, bool]:
        """Yield what owners that are gone left; return False when others will see to the rest.

        True says that all rounds are complete, or that the next one is there.
        """
        nap, longest = SHORTEST_NAP, LONGEST_NAP + self._role.of / WORKERS_A_SECOND
        longest *= 1 if self._stands_by else SELDOM
        while True:
            self.committed.look()
            missing = {r.number: self.committed.first_missing(r) >= 0 for r in self.rounds}
            left = [(r, n) for r in self.rounds for n in np.flatnonzero(missing[r.number]).tolist()]
            if not left:
                return True
            if not self._stands_by and not self.rounds.refining and not self._free(left):
                return False
            found = False
            for round_, number in self._chance.sample(left, min(EXAMINED, len(left))):
                lease = self._next(round_, number)
                if lease and self._claims(round_, number, lease):
                    found = True
                    yield round_, number, lease
            ahead = None if found else self._ahead()
            if ahead:
                yield ahead
            if found or ahead:
                nap = SHORTEST_NAP
                continue
            self._doze(nap * self._chance.uniform(0.5, 1.0))
            if self._next_is_there:
                return True
            nap = min(longest, nap * 1.5)

    def _doze(self, seconds: float) -> None:
        """Sleep, with an eye on the next round."""
        end = time.monotonic() + seconds
        while True:
            self._stop.check()
            time.sleep(max(0.0, min(LONGEST_NAP, end - time.monotonic())))
            if time.monotonic() >= end or self._next_is_there:
                return

    @property
    def _next_is_there(self) -> bool:
        """Whether someone has planned the next round: then all saw this one complete but us."""
        name = self._folder.round(len(self.rounds.all)).name
        return self.rounds.refining and name in names(self._folder.rounds)

    def _free(self, left: list[tuple[Round, int]]) -> bool:
        """Whether nobody has claimed some of these leases."""
        for round_ in {r.number: r for r, _ in left}.values():
            free = self._unclaimed_of(round_)
            if any(r.number == round_.number and n in free for r, n in left):
                return True
        return False

    def _ahead(self) -> Claimed | None:
        """Claim optional points of the last round, the likeliest first; None where there is none.

        Nobody takes these over: should a later round adopt one, it is missing as any other.
        """
        last = self.rounds.last
        if not last.likely:
            return None
        first = self.committed.first_missing(last, optional=True)
        free = self._unclaimed_of(last)
        for number in np.flatnonzero(first >= 0).tolist():
            lease = Lease(self._name, 0, suspect=int(first[number]))
            if number in free and self._claims(last, number, lease):
                return last, number, lease
        return None

    @property
    def _stands_by(self) -> bool:
        return self._role.index % -(-self._role.of // STANDING_BY) == 0

    def _next(self, round_: Round, number: int) -> Lease | None:
        """Return the claim that would take a lease over, or None while its owner is there."""
        unit = round_.lease_range(number, self._plan.slices).start
        last = leases.newest(self._folder, round_.number, unit)
        verdict = Verdict.ENDED
        # An earlier lease of its own, lost on a damaged part, is free too.
        if last is not None and last.worker != self._name:
            verdict = self._observer.verdict(last.worker)
            if verdict is Verdict.ALIVE and not self._observer.hangs(last.worker):
                return None
        # Its owner may have committed more since this worker last looked.
        self.committed.look()
        suspect = int(self.committed.first_missing(round_)[number])
        if suspect < 0:
            return None
        if last is None:
            return Lease(self._name, 0, suspect=suspect)
        return last.next(self._name, suspect, verdict is Verdict.DIED)

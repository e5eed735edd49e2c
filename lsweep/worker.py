"""The worker: lease some units, evaluate them, commit each, until nothing is missing.

Every launcher starts this one function. It needs nobody, and may join or leave at any time.
"""

from __future__ import annotations

import math
import os
import random
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lsweep import leases, machine
from lsweep.committed import Committed
from lsweep.device import check_precision, choose_device, device_class, is_out_of_memory
from lsweep.errors import LsweepError, SickDevice
from lsweep.evaluate import Evaluator, Spot
from lsweep.factory import describe
from lsweep.folder import RunFolder
from lsweep.ledger import Ledger
from lsweep.plan import Plan
from lsweep.planning import load_problem
from lsweep.preflight import frozen_class, preflight
from lsweep.problem import Problem
from lsweep.rounds import Round, Rounds
from lsweep.rows import Kind, Rows
from lsweep.sums import means
from lsweep.surface import Status
from lsweep.workers import Observer, Verdict

AUDIT_SHARE = 100  # one point in so many is evaluated twice
LEAST_AUDITED = 3
CENTRE_TOLERANCE = {"cpu": 0.0, "cuda": 1e-6}
SAME_CENTRE = {"cpu": (1e-6, 0.0), "gpu": (1e-4, 1e-7)}  # relative, absolute; within a class
LONGEST_NAP = 2.0  # seconds between looks at what others left


@dataclass(frozen=True)
class Role:
    """How this worker takes part: worker ``index`` of ``of``, the ``local``-th on its node.

    Attributes:
        index: picks the shard of a round that it begins with.
        of: number of workers.
        local: picks its GPU.
        device: ``auto``, ``cpu``, ``cuda:1``, ….
        threads: torch threads; 0 leaves torch's own choice.
        claims: ``lease``; or ``static``, each worker its shard only, where metadata lies.
        beat: seconds between heartbeats.
        trust: import a factory that belongs to another user.
        parent: the process that started it; when that is gone it ends. 0: it needs nobody.
    """

    index: int = 0
    of: int = 1
    local: int = 0
    device: str = "auto"
    threads: int = 1
    claims: str = "lease"
    beat: float = 10.0
    trust: bool = False
    parent: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise LsweepError(f"--index {self.index}: must be from 0 to {self.of - 1} (--of)")


def work(folder: RunFolder, role: Role, problem: Problem | None = None) -> int:
    """Be one worker, until every round of the run is complete.

    Args:
        folder: the run.
        role: how to take part.
        problem: a live problem; otherwise the run's factory is called.

    Returns:
        How many points it evaluated.

    Raises:
        LsweepError: the run cannot be worked on.
        SickDevice: the device no longer gives its own value at the centre.
    """
    plan = Plan.read(folder)
    rounds = Rounds.read(folder, plan)
    if role.threads:
        torch.set_num_threads(role.threads)
    device = choose_device(role.device, role.local)
    check_precision(plan.evaluate["precision"], device)
    if bool(Committed.read(folder, plan, rounds).done.all()):
        return 0
    problem, directions = load_problem(folder, plan, problem, role.trust)
    name = machine.worker_name()
    known = frozen_class(folder, plan, device_class(device))
    sizes = known["batch_sizes"] if known else None
    with Evaluator(problem, plan.evaluate, directions, device, sizes) as evaluator:
        known = known or _preflight(folder, plan, evaluator, rounds.last.expected, name)
        evaluator.batch_sizes.update(known["batch_sizes"])
        _require_same_centre(evaluator, plan, known)
        with Ledger(folder, plan, name, known, role.beat, evaluator) as ledger:
            _Shift(folder, plan, role, evaluator, ledger).run()
            return ledger.points


def _preflight(
    folder: RunFolder, plan: Plan, evaluator: Evaluator, expected: dict[str, float], name: str
) -> dict[str, Any]:
    """Run the pre-flight: the first place where memory is too small, or the user's code fails."""
    while True:
        try:
            return preflight(folder, plan, evaluator, expected, name)
        except LsweepError:
            raise
        except Exception as e:
            if not is_out_of_memory(e) or not evaluator.halve_batch():
                raise LsweepError(
                    f"the problem fails at its own weights, before any is moved: {describe(e)}"
                ) from e


def _require_same_centre(evaluator: Evaluator, plan: Plan, known: dict[str, Any]) -> None:
    """The centre must be what the first worker of this class found, or the class is a fiction."""
    slices = [evaluator.centre(s) for s in range(plan.slices)]
    for name, parts in zip(plan.variable_names, zip(*slices, strict=True), strict=True):
        there = known["centre"].get(name)
        relative, absolute = SAME_CENTRE["cpu" if evaluator.device.type == "cpu" else "gpu"]
        weight = sum(float(s.weights.sum()) for s in parts)
        here = sum(float((s.weights * s.values).sum()) for s in parts) / (weight or math.nan)
        if there is not None and not abs(here - there) <= relative * abs(there) + absolute:
            raise SickDevice(
                f"{socket.gethostname()} {evaluator.device}: {name} at the centre is {here!r}, the "
                f"first worker of its class {known['class']} found {there!r}; nothing was written"
            )


class _Shift:
    """One worker's way through the rounds."""

    def __init__(
        self, folder: RunFolder, plan: Plan, role: Role, evaluator: Evaluator, ledger: Ledger
    ) -> None:
        self._folder, self._plan, self._role = folder, plan, role
        self._evaluator, self._ledger = evaluator, ledger
        self._observer = Observer(folder)
        self._rounds = Rounds.read(folder, plan)
        self._committed = Committed.read(folder, plan, self._rounds)
        self._jitter = random.Random(ledger.name)  # when to look again, never what to compute

    def run(self) -> None:
        """Work until no round has a missing point."""
        while True:
            for round_ in self._rounds:
                self._round(round_)
            fresh = Rounds.read(self._folder, self._plan)
            if fresh.total == self._rounds.total:
                return
            self._rounds = fresh
            self._look()

    def _look(self) -> None:
        self._committed = Committed.read(self._folder, self._plan, self._rounds)

    def _round(self, round_: Round) -> None:
        count = round_.leases(self._plan.slices)
        mine = range(self._role.index, count, self._role.of)
        if self._role.claims == "static":
            for number in mine:
                self._do(round_, number, None)
            return
        for number in self._fresh(round_, mine, count):
            lease = leases.Lease(self._ledger.name, 0, suspect=self._first_missing(round_, number))
            if leases.claim(self._folder, round_.number, number, lease):
                self._do(round_, number, lease)
        nap = 0.05
        while True:
            self._look()
            left = [n for n in range(count) if self._first_missing(round_, n) >= 0]
            if not left:
                return
            self._jitter.shuffle(left)
            taken = [self._take_over(round_, number) for number in left]
            if any(taken):
                nap = 0.05
            else:
                self._end_with_parent()
                time.sleep(nap * self._jitter.uniform(0.5, 1.0))
                nap = min(LONGEST_NAP, nap * 1.5)

    def _fresh(self, round_: Round, mine: range, count: int) -> Iterator[int]:
        """Yield leases to try: first one's shard, coarse to fine; then what the others left."""
        missing = [n for n in range(count) if self._first_missing(round_, n) >= 0]
        own = [n for n in missing if n in mine]
        yield from own
        free = leases.unclaimed(self._folder, round_.number, count)
        others = [n for n in missing if n not in mine and n in free]
        # From the far end: the owner of a shard comes from the near one.
        yield from reversed(others)

    def _first_missing(self, round_: Round, number: int) -> int:
        for unit in round_.lease_range(number, self._plan.slices):
            missing = self._committed.missing(round_, unit, self._plan.slices)
            if missing:
                return missing[0]
        return -1

    def _take_over(self, round_: Round, number: int) -> bool:
        """Claim the next generation of a lease whose owner is gone; True when it was done."""
        last = leases.newest(self._folder, round_.number, number)
        if last is None:
            lease = leases.Lease(self._ledger.name, 0, suspect=self._first_missing(round_, number))
        else:
            verdict = self._observer.verdict(last.worker)
            if last.worker == self._ledger.name:
                verdict = Verdict.ENDED  # an earlier lease of its own, lost on a damaged part
            if verdict is Verdict.ALIVE:
                return False
            # Its owner may have committed more since this worker last looked.
            self._look()
            suspect = self._first_missing(round_, number)
            if suspect < 0:
                return True
            lease = last.next(self._ledger.name, suspect, verdict is Verdict.DIED)
        if not leases.claim(self._folder, round_.number, number, lease):
            return False
        self._do(round_, number, lease)
        return True

    def _do(self, round_: Round, number: int, lease: leases.Lease | None) -> None:
        slices = self._plan.slices
        for unit in round_.lease_range(number, slices):
            missing = self._committed.missing(round_, unit, slices)
            _, slice_ = round_.unit(unit, slices)
            if lease is not None and lease.single:
                for point in missing:
                    if lease.poisoned and point == lease.suspect:
                        reason = f"killed {lease.kills} workers that evaluated it alone"
                        self._fail([point], slice_, reason)
                    else:
                        self._unit([point], slice_)
            elif missing:
                self._unit(missing, slice_)

    def _end_with_parent(self) -> None:
        """A killed launcher must not leave workers behind that nobody watches."""
        if self._role.parent and os.getppid() != self._role.parent:
            raise KeyboardInterrupt("the launcher is gone")

    # -- one unit -------------------------------------------------------------------------------

    def _spots(self, points: Iterable[int]) -> list[Spot]:
        r = self._rounds
        return [Spot(tuple(map(float, r.offsets[p])), int(r.step[p])) for p in points]

    def _unit(self, points: list[int], slice_: int) -> None:
        """Evaluate points and commit them; what goes wrong is told apart point by point."""
        self._end_with_parent()
        start = time.perf_counter()
        try:
            sums = self._evaluate(points, slice_)
        except LsweepError:
            raise
        except Exception as e:
            if len(points) > 1:
                for point in points:
                    self._unit([point], slice_)
                return
            self._require_health(slice_, e)
            self._fail(points, slice_, describe(e))
            return
        seconds = (time.perf_counter() - start) / len(points)
        rows = self._ledger.empty(len(points))
        rows["point"], rows["slice"], rows["kind"] = points, slice_, Kind.VALUE
        rows["sums"], rows["seconds"] = sums, seconds
        # A sum may overflow where the value itself does not count as one that is missing.
        values = means(sums)
        finite = np.isfinite(values).all(axis=-1)
        rows["status"] = np.where(finite, Status.OK, Status.NONFINITE)
        self._ledger.commit(rows)
        audited = [p for p in points if self._is_audited(p)]
        if audited:
            self._ledger.commit(self._audit(audited, slice_))
        self._ledger.points += len(points)
        first = values[:, 0]
        whole = self._plan.slices == 1 and np.isfinite(first).any()
        least = float(first[np.isfinite(first)].min()) if whole else None
        self._ledger.heart.did(len(points), time.perf_counter() - start, least)

    def _evaluate(self, points: list[int], slice_: int, audit: bool = False) -> Any:
        while True:
            try:
                return self._evaluator.evaluate(self._spots(points), slice_, audit)
            except Exception as e:
                if not is_out_of_memory(e) or not self._evaluator.halve_batch():
                    raise
                self._ledger.new_part()  # its header names the batch sizes

    def _is_audited(self, point: int) -> bool:
        """One point in a hundred, at least three: by number, so every worker agrees which."""
        stride = min(AUDIT_SHARE, max(1, self._rounds.total // LEAST_AUDITED))
        return point % stride == stride // 2

    def _audit(self, points: list[int], slice_: int) -> Rows:
        rows = self._ledger.empty(len(points))
        rows["point"], rows["slice"], rows["kind"] = points, slice_, Kind.AUDIT
        rows["status"] = Status.OK
        try:
            rows["sums"] = self._evaluate(points, slice_, audit=True)
        except LsweepError:
            raise
        except Exception:  # the values stand; that they could not be audited is told by the merge
            rows["status"] = Status.FAILED
        return rows

    def _fail(self, points: list[int], slice_: int, reason: str) -> None:
        rows = self._ledger.empty(len(points))
        rows["point"], rows["slice"], rows["kind"] = points, slice_, Kind.VALUE
        rows["status"] = Status.FAILED
        rows["sums"] = np.nan
        self._ledger.commit(rows, dict.fromkeys(range(len(points)), reason))

    def _require_health(self, slice_: int, error: Exception) -> None:
        """After an exception the centre must still give its value; otherwise the device is sick."""
        ev = self._evaluator
        where = f"{socket.gethostname()} {ev.device}"
        try:
            before = ev.centre(slice_)
            again = ev.samples([Spot((0.0,) * len(self._plan.axes))], slice_)[0]
        except Exception as e:
            raise SickDevice(
                f"{where}: after {describe(error)} the centre fails too ({describe(e)}); nothing "
                "was written for this point"
            ) from None
        tolerance = CENTRE_TOLERANCE.get(ev.device.type, 1e-5)
        for a, b in zip(before, again, strict=True):
            same = torch.isclose(a.values, b.values, rtol=tolerance, atol=tolerance, equal_nan=True)
            if not bool(same.all()):
                raise SickDevice(
                    f"{where}: after {describe(error)} the centre gives another value; nothing was "
                    "written for this point"
                ) from None

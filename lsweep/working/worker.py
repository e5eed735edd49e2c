"""The worker: lease some units, evaluate them, commit each, until nothing is missing.

Every launcher starts this one function. It needs nobody, and may join or leave at any time.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from lsweep.backends.packed import Spot
from lsweep.errors import LsweepError, PlanChanged, SickDevice
from lsweep.evaluating.anchor import anchored, let_go
from lsweep.evaluating.evaluate import Evaluator
from lsweep.evaluating.picking import Picker
from lsweep.evaluating.preflight import FAILS, frozen_class, preflight
from lsweep.hosts import machine
from lsweep.hosts.device import check_precision, choose_device, device_class, is_out_of_memory
from lsweep.hosts.startup import turn
from lsweep.hosts.stopping import Stop, Stopped
from lsweep.outcomes.frozen import as_before
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Round
from lsweep.preparing.restoring import load_problem, require_repeatable
from lsweep.problems.factory import describe
from lsweep.problems.problem import Problem
from lsweep.problems.residence import resident
from lsweep.storage.folder import RunFolder
from lsweep.storage.holding import held
from lsweep.storage.leases import Lease
from lsweep.storage.rows import Kind, Rows
from lsweep.storage.sums import means
from lsweep.surfaces.surface import Status
from lsweep.working.ledger import Ledger
from lsweep.working.role import Role
from lsweep.working.shift import Shift
from lsweep.working.watchdog import watched

CHOOSING = 600.0  # seconds, at most, that a worker waits for another's choice of a backend
AUDIT_SHARE = 100  # one point in so many is evaluated twice
LEAST_AUDITED = 3
CENTRE_TOLERANCE = {"cpu": 0.0, "cuda": 1e-6}
SAME_CENTRE = {"cpu": (1e-6, 0.0), "gpu": (1e-4, 1e-7)}  # relative, absolute; within a class


def work(
    folder: RunFolder,
    role: Role,
    problem: Problem | None = None,
    stop: Stop | None = None,
    as_it_is: bool = False,
) -> int:
    """Be one worker, until nothing of the run is left for it to do.

    Args:
        folder: the run.
        role: how to take part.
        problem: a live problem; otherwise the run's factory is called.
        stop: asked before every unit whether it may begin.
        as_it_is: the live problem counts, whatever its factory would make.

    Returns:
        How many points it evaluated.

    Raises:
        LsweepError: the run cannot be worked on.
        SickDevice: the device no longer gives its own value at the centre.
        Stopped: it was told to end, or its time is over; all that it committed is kept.
    """
    with held(folder.plan):
        return _work(folder, role, problem, stop or Stop(), as_it_is)


def _work(
    folder: RunFolder, role: Role, problem: Problem | None, stop: Stop, as_it_is: bool
) -> int:
    plan = _planned(folder, role.plan)
    if role.threads:
        torch.set_num_threads(role.threads)
    device = choose_device(role.device, role.local)
    check_precision(plan.evaluate["precision"], device)
    name = machine.worker_name()
    shift = Shift(folder, plan, role, name, stop)
    if not shift.open():
        return 0
    live = problem is not None
    if problem is not None and not as_it_is and role.of == 1:
        require_repeatable(folder, plan, problem, role.trust)
    apart = contextlib.nullcontext() if live else machine.large_apart()
    with turn(plan.digest), apart:
        problem, directions = load_problem(folder, plan, problem, role.trust)
    machine.trim_memory()  # of what made the data and the directions
    class_ = device_class(device)
    known = frozen_class(folder, plan, class_)
    with (
        resident(problem, plan, 1 if live else role.of) as problem,
        Evaluator(problem, plan.evaluate, directions, device, own=not live) as evaluator,
    ):
        if known is None:
            # Its choice takes time: others of the class wait for it instead of choosing too.
            with turn(f"{plan.digest} {class_}", CHOOSING):
                known = frozen_class(folder, plan, class_)
                if known is None:
                    over_all = anchored(problem, plan.evaluate, device)
                    known = _preflight(folder, plan, evaluator, shift, role.of, name, over_all)
        let_go(problem)
        _use(evaluator, known)
        machine.trim_memory()  # of what was tried
        _require_same_centre(evaluator, plan.slices, known)
        with Ledger(folder, plan, name, known, role, evaluator) as ledger:
            # Where locks end at a node's door, others see from now on that the plan is in use.
            _planned(folder, plan.digest)
            bench = _Bench(plan, shift, evaluator, ledger, stop)
            picker = Picker(evaluator, plan, stop)
            # Alone it has nobody who would do its unit, and its process may be a notebook's.
            watch = watched(folder, ledger.heart) if role.of > 1 else contextlib.nullcontext()
            try:
                with watch:
                    for round_, number, lease in shift.leases(picker, known["seconds_per_point"]):
                        bench.do(round_, number, lease)
            except Stopped as e:
                e.points = ledger.points
                raise
            return ledger.points


def _planned(folder: RunFolder, digest: str) -> Plan:
    plan = Plan.read(folder)
    if digest not in ("", plan.digest):
        raise PlanChanged(f"{folder.root}: another command replaced its plan meanwhile", "plan")
    return plan


def _use(evaluator: Evaluator, known: dict[str, Any]) -> None:
    """Evaluate as the first worker of the class chose, or not at all: values would differ."""
    try:
        evaluator.use(known["backend"], known["batch_sizes"], known["precision"])
    except LsweepError as e:
        raise LsweepError(
            f"{socket.gethostname()} cannot build the backend {known['backend']!r}, which the "
            f"first worker of its class {known['class']} chose: {e}"
        ) from e


def _preflight(
    folder: RunFolder,
    plan: Plan,
    evaluator: Evaluator,
    shift: Shift,
    workers: int,
    name: str,
    over_all: dict[str, float],
) -> dict[str, Any]:
    """Run the pre-flight: the first place where memory is too small, or the user's code fails."""
    rounds, class_ = shift.rounds, device_class(evaluator.device)
    axes = rounds.last.lattice.axes.values()
    corners = [Spot(tuple(float(a[end]) for a in axes)) for end in (0, -1)]
    points, expected = rounds.foreseen / workers, rounds.last.expected
    before = as_before((reader.header for reader in shift.committed.readers), class_)
    return evaluator.fitted(
        lambda: preflight(
            folder, plan, evaluator, expected, name, corners, points, over_all, before
        ),
        FAILS,
    )


def _require_same_centre(evaluator: Evaluator, count: int, known: dict[str, Any]) -> None:
    """The centre must be what the first worker of this class found, or the class is a fiction."""
    slices = [evaluator.centre(s) for s in range(count)]
    for name, parts in zip(evaluator.names, zip(*slices, strict=True), strict=True):
        there = known["centre"].get(name)
        relative, absolute = SAME_CENTRE["cpu" if evaluator.device.type == "cpu" else "gpu"]
        weight = sum(float(s.weights.sum()) for s in parts)
        here = sum(float((s.weights * s.values).sum()) for s in parts) / (weight or math.nan)
        if there is not None and not abs(here - there) <= relative * abs(there) + absolute:
            raise SickDevice(
                f"{socket.gethostname()} {evaluator.device}: {name} at the centre is {here!r}, the "
                f"first worker of its class {known['class']} found {there!r}; nothing was written "
                "(where the data has changed meanwhile 'lsweep verify --data' says so)"
            )


class _Bench:
    """Where leases are worked off: units are evaluated, committed, and troubles told apart."""

    def __init__(
        self, plan: Plan, shift: Shift, evaluator: Evaluator, ledger: Ledger, stop: Stop
    ) -> None:
        self._plan, self._shift, self._stop = plan, shift, stop
        self._evaluator, self._ledger = evaluator, ledger

    def do(self, round_: Round, number: int, lease: Lease | None) -> None:
        """Evaluate and commit what a lease still lacks."""
        slices = self._plan.slices
        for unit in round_.lease_range(number, slices):
            missing = self._shift.committed.missing(round_, unit, slices)
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
        self._ledger.heart.tell(unit=None)

    # -- one unit -------------------------------------------------------------------------------

    def _spots(self, points: Iterable[int]) -> list[Spot]:
        r = self._shift.rounds
        return [Spot(tuple(map(float, r.offsets[p])), int(r.step[p])) for p in points]

    def _unit(self, points: list[int], slice_: int) -> None:
        """Evaluate points and commit them; what goes wrong is told apart point by point."""
        self._stop.check(self._ledger.heart.longest)
        self._ledger.heart.tell(unit=time.time())
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
        """One point in a hundred, at least three of the first round's, none that may not count.

        By number, so every worker agrees which. Pointwise metrics are not audited: each costs as
        much as hundreds of points of a mean.
        """
        if not self._evaluator.stored:
            return False
        first = self._shift.rounds.all[0].points
        few = first // LEAST_AUDITED if point < first else AUDIT_SHARE
        stride = min(AUDIT_SHARE, max(1, few))
        return point % stride == stride // 2 and bool(self._shift.rounds.required[point])

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

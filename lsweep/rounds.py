"""Rounds: published lists of asked points, numbered through, cut into units and leases.

A point has one number for the whole run: round r asks the numbers ``first`` to ``first + points``,
in the order coarse to fine, and what an earlier round asked is not asked again. A unit is some
consecutive numbers times one slice of the data; a lease covers some consecutive units. The
published file is the truth; everything here is derived from it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.errors import DamagedFile, LsweepError
from lsweep.files import publish, read_json, sealed
from lsweep.folder import RunFolder
from lsweep.insist import names, there
from lsweep.plan import Plan
from lsweep.points import IntArray, Lattice
from lsweep.settings import Axis

FloatArray = npt.NDArray[np.float64]
MAX_UNIT_POINTS = 16
UNITS_WANTED = 1024  # so many workers find something to do
LARGE_UNITS_WANTED = 16  # where a unit reads much data, which serves all its points
LEASES_WANTED = 16384


@dataclass(frozen=True)
class Round:
    """One published list of points.

    Attributes:
        plan: digest of the plan.
        number: 0, 1, ….
        first: number of its first point.
        points: how many points it asks.
        grid: axis -> (low, high, count), the bounds as decimals in text.
        steps: how many of the points, the last ones, are checkpoints of the trajectory.
        again: numbers of earlier points that are asked again, or None for the grid's new points.
        unit_points: points of a unit.
        lease_units: units of a lease.
        expected: variable -> the value that the user expects at the centre.
    """

    plan: str
    number: int
    first: int
    points: int
    grid: dict[str, tuple[str, str, int]]
    steps: int
    again: list[int] | None
    unit_points: int
    lease_units: int
    expected: dict[str, float] = field(default_factory=dict)

    @functools.cached_property
    def lattice(self) -> Lattice:
        """The grid that the surface has after this round."""
        axes = {
            name: Axis((Decimal(low), Decimal(high)), int(count))
            for name, (low, high, count) in sorted(self.grid.items())
        }
        return Lattice.of(axes)

    def units(self, slices: int) -> int:
        """Number of units: blocks of points times slices."""
        return -(-self.points // self.unit_points) * slices

    def leases(self, slices: int) -> int:
        """Number of leases."""
        return -(-self.units(slices) // self.lease_units)

    def lease_range(self, lease: int, slices: int) -> range:
        """The units of a lease."""
        start = lease * self.lease_units
        return range(start, min(start + self.lease_units, self.units(slices)))

    def unit(self, number: int, slices: int) -> tuple[range, int]:
        """The point numbers and the slice of a unit."""
        block, slice_ = divmod(number, slices)
        start = self.first + block * self.unit_points
        return range(start, min(start + self.unit_points, self.first + self.points)), slice_


def as_grid(grid: dict[str, Axis]) -> dict[str, tuple[str, str, int]]:
    """Return a ``[grid]`` as a round stores it.

    >>> as_grid({"x": Axis((Decimal("-1.0"), Decimal("1")), 5)})
    {'x': ('-1', '1', 5)}
    """
    out = {}
    for name, axis in grid.items():
        assert not isinstance(axis.range, str)
        low, high = (_decimal(b) for b in axis.range)
        out[name] = (low, high, axis.count)
    return out


def _decimal(bound: Decimal) -> str:
    text = format(bound, "f")  # exact, unlike normalize(), which rounds to 28 digits
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text if bound else "0"


class Rounds:
    """All rounds of a run, and the numbering of its points."""

    def __init__(self, plan: Plan, rounds: list[Round]) -> None:
        self.plan, self.all = plan, rounds
        self.total = sum(r.points for r in rounds)
        for r in rounds:
            if r.again is None and self._count_new(r) + r.steps != r.points:
                raise DamagedFile(f"round {r.number} asks {r.points} points, its grid has others")

    def _known(self, r: Round) -> npt.NDArray[np.bool_] | None:
        """Which points of a round's grid an earlier one has; None where there is no earlier one."""
        known = None
        for earlier in self.all[: r.number]:
            if known is None:
                known = np.zeros(len(r.lattice), dtype=bool)
            known |= earlier.lattice.find(r.lattice) >= 0
        return known

    def _count_new(self, r: Round) -> int:
        known = self._known(r)
        return len(r.lattice) - (0 if known is None else int(known.sum()))

    # A million points take megabytes and tenths of a second: who only counts needs none of these.

    @functools.cached_property
    def _orders(self) -> list[IntArray]:
        """For each round the new points of its grid, in the order in which it asks them."""
        orders = []
        for r in self.all:
            known = self._known(r)
            order = (
                np.empty(0, dtype=np.int64) if r.again is not None else r.lattice.coarse_to_fine()
            )
            orders.append(order if known is None or r.again is not None else order[~known[order]])
        return orders

    @functools.cached_property
    def offsets(self) -> FloatArray:
        """(points, axes) offsets of every number; not those of a trajectory's steps."""
        offsets = np.zeros((self.total, len(self.plan.axes)))
        for r, order in zip(self.all, self._orders, strict=True):
            here = slice(r.first, r.first + r.points)
            if r.again is not None:
                offsets[here] = offsets[r.again]
            else:
                offsets[r.first : r.first + len(order)] = r.lattice.offsets(order)
        return offsets

    @functools.cached_property
    def step(self) -> IntArray:
        """(points,) which step of the trajectory a number is, or -1."""
        step = np.full(self.total, -1, dtype=np.int64)
        for r in self.all:
            end = r.first + r.points
            if r.again is not None:
                step[r.first : end] = step[r.again]
            else:
                step[end - r.steps : end] = np.arange(r.steps)
        return step

    @functools.cached_property
    def first_asked(self) -> IntArray:
        """(points,) the number under which the point of each number was asked first."""
        first = np.arange(self.total, dtype=np.int64)
        for r in self.all:
            if r.again is not None:
                first[r.first : r.first + r.points] = first[r.again]
        return first

    @classmethod
    def read(cls, folder: RunFolder, plan: Plan) -> Rounds:
        """Read all rounds of a run.

        Raises:
            LsweepError: there is none.
            DamagedFile: one was altered, is missing in between, or belongs to another plan.
        """
        # One listing: a node of a shared file system may still hold a listed name for absent.
        listed = [n for n in names(folder.rounds) if n[0].isdigit() and n.endswith(".json")]
        rounds: list[Round] = []
        while folder.round(len(rounds)).name in listed:
            path = folder.round(len(rounds))
            value = read_json(path)
            try:
                r = Round(**{**value, "grid": {k: tuple(v) for k, v in value["grid"].items()}})
            except (TypeError, KeyError, AttributeError) as e:
                raise DamagedFile(f"{path} is not a round: {e}") from None
            if r.plan != plan.digest or r.number != len(rounds):
                raise DamagedFile(f"{path} belongs to another plan than {folder.plan}")
            rounds.append(r)
        if not rounds:
            raise LsweepError(f"{folder.root} has no rounds/0000.json: plan it with 'lsweep plan'")
        if len(listed) > len(rounds):
            raise DamagedFile(f"{folder.round(len(rounds))} is missing: later rounds exist")
        return cls(plan, rounds)

    @property
    def last(self) -> Round:
        """The newest round, whose grid the surface has."""
        return self.all[-1]

    @property
    def asked_again(self) -> bool:
        """True when some point was asked for more than once."""
        return any(r.again is not None for r in self.all)

    def numbers_of(self, lattice: Lattice) -> IntArray:
        """Return for each point of a lattice, in C order, its number, or -1 if never asked."""
        numbers = np.full(len(lattice), -1, dtype=np.int64)
        for r, order in zip(self.all, self._orders, strict=True):
            place = np.full(len(r.lattice) + 1, -1, dtype=np.int64)  # the last entry serves -1
            place[order] = r.first + np.arange(len(order))
            found = place[:-1] if r.lattice is lattice else place[r.lattice.find(lattice)]
            np.copyto(numbers, found, where=numbers < 0)
        return numbers

    def step_numbers(self) -> IntArray:
        """Return the point numbers of the trajectory's steps, in order."""
        first = self.all[0]
        return np.arange(first.first + first.points - first.steps, first.first + first.points)

    def __iter__(self) -> Iterator[Round]:
        return iter(self.all)


def publish_round(
    folder: RunFolder,
    plan: Plan,
    grid: dict[str, Axis],
    *,
    expected: dict[str, float] | None = None,
    again: list[int] | None = None,
    after: int | None = None,
    unit_points: int | None = None,
) -> Rounds:
    """Ask for a grid, or for earlier points again; nothing is published when nothing changes.

    Args:
        folder: the run.
        plan: its plan.
        grid: the surface's axes after this round.
        expected: values that the user expects at the centre.
        again: earlier points to ask again.
        after: publish nothing unless there are just so many rounds.
        unit_points: points of a unit.

    Returns:
        All rounds, as they are published: when someone else was first, theirs.
    """
    while True:
        try:
            rounds = Rounds.read(folder, plan)
            before = rounds.all
        except LsweepError:
            if there(folder.round(0)):
                raise
            before = []
        if after is not None and len(before) != after:
            return rounds
        wanted = as_grid(grid)
        if before and again is None:
            last = before[-1]
            if last.grid == wanted and last.expected == (expected or {}):
                return rounds
        total = sum(r.points for r in before)
        steps = 0 if before else len(plan.steps)
        draft = Round(
            plan.digest, len(before), total, 0, wanted, steps, again, 1, 1, expected or {}
        )
        if again is not None:
            points = len(again)
        else:
            seen = Rounds(plan, before) if before else None
            points = steps + int(
                (seen.numbers_of(draft.lattice) < 0).sum() if seen else len(draft.lattice)
            )
        wanted_units = LARGE_UNITS_WANTED if plan.facts.get("large") else UNITS_WANTED
        unit = unit_points or max(1, min(MAX_UNIT_POINTS, points // wanted_units))
        units = -(-points // unit) * plan.slices
        draft = dataclasses.replace(
            draft,
            points=points,
            unit_points=unit,
            lease_units=max(1, -(-units // LEASES_WANTED)),
        )
        value: dict[str, Any] = dataclasses.asdict(draft)
        if publish(folder.round(draft.number), sealed(value)):
            return Rounds.read(folder, plan)


def ask_again(folder: RunFolder, failed: Callable[[], list[int]]) -> None:
    """Publish a round that asks for failed points again, on the grid there is.

    Several ranks may do so at once: who finds that another round came first counts anew.
    """
    plan = Plan.read(folder)
    while True:
        before = Rounds.read(folder, plan)
        points, last, count = failed(), before.last, len(before.all)
        if not points:
            return
        grid = {n: Axis((Decimal(a), Decimal(b)), c) for n, (a, b, c) in last.grid.items()}
        rounds = publish_round(
            folder, plan, grid, expected=last.expected, again=points, after=count
        )
        if rounds.all[count].again == points:
            return

"""Rounds: published lists of asked points, numbered through, cut into units and leases.

A point has one number for the whole run: round r asks the numbers ``first`` to ``first + points``,
in the order coarse to fine, and what an earlier round asked is not asked again. A unit is some
consecutive numbers times one slice of the data; a lease covers some consecutive units. The
published file is the truth; everything here is derived from it.

With refinement a round asks a list of points, and some more, its last, that idle workers may
evaluate ahead. Those are required only once a later round adopts them; until then nothing is
decided or merged from them, for which of them exist is a matter of chance.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.errors import DamagedFile, LsweepError
from lsweep.plans.plan import Plan
from lsweep.plans.points import IntArray, Lattice
from lsweep.plans.recipes import Axis
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import names

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
COVERED = "meant to cover 95 % of points"  # what every stated error is calibrated to
FORESEEN = 3  # times the points of its first round are what a refinement usually takes


class Goal(enum.StrEnum):
    """What a round says of the refinement that it belongs to."""

    OPEN = "open"
    DONE = "done"
    DENSE = "dense"


@dataclass(frozen=True)
class Refining:
    """How far the refinement of a grid has come.

    Attributes:
        tolerance: bound of the error that is aimed at, a share of the log scale's range.
        state: ``open`` while more points may be asked, ``done``, or ``dense``: every point is.
        held_out: numbers of points that chance chose before any value was known: from them it is
            learned how far the estimated error may be trusted.
        error: what was estimated when the round was decided on; None where that was not possible.
        why: the reason for ``dense``.
        audit: what `lsweep.refinement.audit` found when the refinement was done; empty where it
            was not made.
    """

    tolerance: float
    state: str = Goal.OPEN
    held_out: list[int] = field(default_factory=list)
    error: float | None = None
    why: str = ""
    audit: dict[str, Any] = field(default_factory=dict)


def describe_refining(refine: Refining) -> str:
    """Return in words how far refinement has come.

    >>> describe_refining(Refining(0.01, error=0.0312))
    'tolerance 1%, stated error up to 3.1% (meant to cover 95 % of points) so far'
    """
    words = [f"tolerance {percent(refine.tolerance)}"]
    if refine.state == Goal.DENSE:
        words = [f"every point is evaluated: {refine.why}"]
    elif refine.error is not None:
        so_far = " so far" if refine.state == Goal.OPEN else ""
        words.append(f"{stated_error(refine.error)}{so_far}")
    return ", ".join(words)


def stated_error(share: float, of: str = "") -> str:
    """Return in words the largest error that is stated; it is no bound, and says so.

    Args:
        share: the largest stated error, a share of a range.
        of: of which range.

    >>> stated_error(0.0059, "of the log range")
    'stated error up to 0.59% of the log range (meant to cover 95 % of points)'
    """
    return f"stated error up to {' '.join(filter(None, (percent(share), of)))} ({COVERED})"


def percent(share: float) -> str:
    """Return a share with two digits.

    >>> percent(0.01), percent(0.0312), percent(2e-5), percent(1.0)
    ('1%', '3.1%', '0.002%', '100%')
    """
    return f"{float(f'{100 * share:.2g}'):g}%"


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
        asked: the new points, as C-order indices of the grid in their order; None for all of them.
        likely: how many of the points, the last ones, are optional.
        adopted: numbers of earlier optional points that this round requires.
        refine: how far refinement has come, or None where every point is asked.
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
    asked: list[int] | None = None
    likely: int = 0
    adopted: list[int] = field(default_factory=list)
    refine: Refining | None = None

    @classmethod
    def of(cls, value: dict[str, Any]) -> Round:
        """Make a round from what its file holds."""
        refine = value.get("refine")
        grid = {name: tuple(v) for name, v in value["grid"].items()}
        return cls(**{**value, "grid": grid, "refine": Refining(**refine) if refine else None})

    @property
    def lattice(self) -> Lattice:
        """The grid that the surface has after this round."""
        return lattice_of(self.grid)

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


def as_axes(grid: Mapping[str, tuple[str, str, int]]) -> dict[str, Axis]:
    """Return the grid of a round as a ``[grid]``.

    >>> as_grid(as_axes({"x": ("-1", "1", 5)}))
    {'x': ('-1', '1', 5)}
    """
    return {n: Axis((Decimal(a), Decimal(b)), int(c)) for n, (a, b, c) in sorted(grid.items())}


def lattice_of(grid: Mapping[str, tuple[str, str, int]]) -> Lattice:
    """Return the lattice of a grid; rounds of one grid share one."""
    return _lattice(tuple(sorted(grid.items())))


@functools.lru_cache(maxsize=4)
def _lattice(grid: tuple[tuple[str, tuple[str, str, int]], ...]) -> Lattice:
    return Lattice.of(as_axes(dict(grid)))


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

    def _known(self, r: Round) -> BoolArray | None:
        """Which points of a round's grid an earlier one has; None where there is no earlier one."""
        known = None
        for earlier in self.all[: r.number]:
            if earlier.asked is not None:
                has = np.zeros(len(earlier.lattice) + 1, dtype=bool)  # the last entry serves -1
                has[earlier.asked] = True
                here = has[:-1] if earlier.lattice is r.lattice else has[_places(earlier, r)]
            else:
                here = _places(earlier, r) >= 0
            known = here if known is None else known | here
        return known

    def _count_new(self, r: Round) -> int:
        if r.asked is not None:
            return len(r.asked)
        known = self._known(r)
        return len(r.lattice) - (0 if known is None else int(known.sum()))

    # A million points take megabytes and tenths of a second: who only counts needs none of these.

    @functools.cached_property
    def _orders(self) -> list[IntArray]:
        """For each round the new points of its grid, in the order in which it asks them."""
        orders = []
        for r in self.all:
            if r.again is not None or r.asked is not None:
                orders.append(np.array(r.asked or [], dtype=np.int64))
                continue
            known, order = self._known(r), r.lattice.coarse_to_fine(self.plan.counting)
            orders.append(order if known is None else order[~known[order]])
        return orders

    @functools.cached_property
    def required(self) -> BoolArray:
        """(points,) which numbers count: all but those that were asked as likely and not adopted.

        They alone decide whether the run is complete, what is asked next, and the surface.
        """
        required = np.ones(self.total, dtype=bool)
        for r in self.all:
            end = r.first + r.points
            required[end - r.likely : end] = False
        for r in self.all:
            required[r.adopted] = True
        return required

    @property
    def foreseen(self) -> int:
        """How many points there will be, as far as can be told before a refinement is done."""
        more = FORESEEN if self.refining else 1
        return min(more * self.total, max(self.total, len(self.last.lattice)))

    @property
    def refining(self) -> bool:
        """True while a later round may ask more once this one is complete."""
        return self.last.refine is not None and self.last.refine.state == Goal.OPEN

    @property
    def begun(self) -> int:
        """The number of the first point that the present refinement asked, or ``total``."""
        first = self.total
        for r in reversed(self.all):
            if r.refine is None or r.grid != self.last.grid:
                break
            first = r.first
        return first

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
                r = Round.of(value)
            except (TypeError, KeyError, AttributeError) as e:
                raise DamagedFile(f"{path} is not a round: {e}") from None
            if r.plan != plan.digest or r.number != len(rounds):
                raise DamagedFile(f"{path} belongs to another plan than {folder.plan}")
            rounds.append(r)
        if len(listed) > len(rounds):
            raise DamagedFile(f"{folder.round(len(rounds))} is missing: later rounds exist")
        if not rounds:
            raise LsweepError(f"{folder.root} has a plan but no round, for planning was "
                              f"interrupted: '{folder.planned_by}' goes on")  # fmt: skip
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
            if r.lattice is lattice:  # what earlier rounds have is not in the order
                numbers[order] = r.first + np.arange(len(order))
            elif len(order):
                place = np.full(len(r.lattice) + 1, -1, dtype=np.int64)  # the last entry serves -1
                place[order] = r.first + np.arange(len(order))
                np.copyto(numbers, place[r.lattice.find(lattice)], where=numbers < 0)
        return numbers

    def optional_on(self, lattice: Lattice) -> list[int]:
        """Return the numbers of optional points that lie on a lattice."""
        if not any(r.likely for r in self.all):
            return []
        numbers = self.numbers_of(lattice)
        numbers = numbers[numbers >= 0]
        found: list[int] = np.sort(numbers[~self.required[numbers]]).tolist()
        return found

    def step_numbers(self) -> IntArray:
        """Return the point numbers of the trajectory's steps, in order."""
        first = self.all[0]
        return np.arange(first.first + first.points - first.steps, first.first + first.points)

    def __iter__(self) -> Iterator[Round]:
        return iter(self.all)


def _places(earlier: Round, r: Round) -> IntArray:
    return earlier.lattice.find(r.lattice)

"""Asking: what the next round asks, and its publication by whoever is first.

A grid is asked whole, or with ``[refine]`` first on its coarse sub-lattice and at the points that
are held out to judge the error. What an earlier round has is not asked again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lsweep.errors import LsweepError
from lsweep.plans.plan import Plan
from lsweep.plans.points import IntArray
from lsweep.plans.recipes import Axis
from lsweep.plans.rounds import Goal, Refining, Round, Rounds, as_grid, lattice_of
from lsweep.plans.settings import Refinement
from lsweep.refinement.refine import first_points
from lsweep.storage.files import publish, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import there

MAX_UNIT_POINTS = 16
UNITS_WANTED = 1024  # so many workers find something to do
LARGE_UNITS_WANTED = 16  # where a unit reads much data, which serves all its points
LEASES_WANTED = 16384


@dataclass(frozen=True)
class Ask:
    """What the next round is to ask, before it has a number.

    Attributes: as those of `Round`, but that ``asked`` holds the required ones alone.
    """

    grid: dict[str, tuple[str, str, int]]
    expected: dict[str, float]
    again: list[int] | None = None
    asked: list[int] | None = None
    likely: list[int] = field(default_factory=list)
    adopted: list[int] = field(default_factory=list)
    refine: Refining | None = None


def ask_grid(
    folder: RunFolder,
    plan: Plan,
    grid: dict[str, Axis],
    *,
    expected: dict[str, float] | None = None,
    refine: Refinement | None = None,
    unit_points: int | None = None,
) -> Rounds:
    """Ask for a grid; nothing is published when nothing changes.

    Args:
        folder: the run.
        plan: its plan.
        grid: the surface's axes after this round.
        expected: values that the user expects at the centre.
        refine: the tolerance, or None for every point.
        unit_points: points of a unit.

    Returns:
        All rounds, as they are published: when someone else was first, theirs.
    """
    wanted, values = as_grid(grid), expected or {}

    def compose(before: Rounds | None) -> Ask | None:
        last = before.last if before else None
        if last is not None and last.grid == wanted and _same_goal(last.refine, refine):
            if last.expected == values:
                return None
            return Ask(wanted, values, asked=[], refine=last.refine)  # another check, no point
        if refine is None:
            adopted = before.optional_on(lattice_of(wanted)) if before else []
            return Ask(wanted, values, adopted=adopted)
        return _first(plan, wanted, values, refine.tolerance, before)

    return publish_round(folder, plan, compose, unit_points)


def _same_goal(there: Refining | None, wanted: Refinement | None) -> bool:
    """Whether a round has every point already, or aims at the tolerance that is wanted."""
    if there is None or there.state == Goal.DENSE:
        return there is not None or wanted is None
    return wanted is not None and there.tolerance == wanted.tolerance


def _first(
    plan: Plan,
    grid: dict[str, tuple[str, str, int]],
    expected: dict[str, float],
    tolerance: float,
    before: Rounds | None,
) -> Ask:
    """Ask for a coarse sub-lattice and for held-out points; those of an earlier grid stay."""
    lattice = lattice_of(grid)
    first = first_points(lattice, plan.digest)
    numbers = before.numbers_of(lattice) if before else np.full(len(lattice), -1, dtype=np.int64)
    total = before.total if before else 0
    held_before = {n for r in before or () if r.refine for n in r.refine.held_out}
    coarse, held_out = first.asked.tolist(), first.held_out.tolist()
    # Chance alone chooses what is held out: not what a decision asked for, nor the sub-lattice.
    kept = held_before.difference(numbers[coarse].tolist())
    held_out = [i for i in held_out if numbers[i] < 0]
    asked, adopted = split(before, numbers, [*coarse, *held_out])
    place = {index: total + k for k, index in enumerate(asked)}
    held = sorted(kept.intersection(numbers.tolist())) if kept else []
    held += [place[i] for i in held_out]
    goal = Refining(tolerance, held_out=held)
    return Ask(grid, expected, asked=asked, adopted=adopted, refine=goal)


def split(
    before: Rounds | None, numbers: IntArray, wanted: list[int]
) -> tuple[list[int], list[int]]:
    """Tell wanted points apart: new ones as indices, optional ones as their numbers.

    Args:
        before: the rounds there are.
        numbers: for each point of the lattice its number, or -1.
        wanted: C-order indices of the lattice; those that are required already fall out.
    """
    asked = [i for i in dict.fromkeys(wanted) if numbers[i] < 0]
    known = {int(numbers[i]) for i in wanted if numbers[i] >= 0}
    adopted = sorted(n for n in known if before is not None and not before.required[n])
    return asked, adopted


def publish_round(
    folder: RunFolder,
    plan: Plan,
    compose: Callable[[Rounds | None], Ask | None],
    unit_points: int | None = None,
) -> Rounds:
    """Publish what is to be asked next; who finds that another was first composes anew.

    Args:
        folder: the run.
        plan: its plan.
        compose: told the rounds there are, None where there is none, returns what to ask, or
            None when nothing changes.
        unit_points: points of a unit.

    Returns:
        All rounds, as they are published.
    """
    while True:
        before = published(folder, plan)
        ask = compose(before)
        if ask is None:
            assert before is not None
            return before
        draft = _draft(plan, before, ask, unit_points)
        if publish(folder.round(draft.number), sealed(dataclasses.asdict(draft))):
            return Rounds.read(folder, plan)


def published(folder: RunFolder, plan: Plan) -> Rounds | None:
    """Return the rounds of a run, or None where its planning stopped before the first."""
    try:
        return Rounds.read(folder, plan)
    except LsweepError:
        if there(folder.round(0)):
            raise
        return None


def _draft(plan: Plan, before: Rounds | None, ask: Ask, unit_points: int | None) -> Round:
    """Number a round's points and cut them into units and leases."""
    number, first = (len(before.all), before.total) if before else (0, 0)
    steps = 0 if before else len(plan.steps)
    likely: list[int] = []
    if ask.again is not None:
        points = len(ask.again)
    elif ask.asked is not None:
        points, likely = len(ask.asked) + steps, ask.likely
    else:
        lattice = lattice_of(ask.grid)
        numbers = before.numbers_of(lattice) if before else np.full(len(lattice), -1)
        points = int((numbers < 0).sum()) + steps
    wanted = LARGE_UNITS_WANTED if plan.facts.get("large") else UNITS_WANTED
    unit = unit_points or max(1, min(MAX_UNIT_POINTS, points // wanted))
    if unit > 1:  # a unit is required or optional; and there is work enough for all
        likely = []
    units = -(-(points + len(likely)) // unit) * plan.slices
    return Round(
        plan.digest,
        number,
        first,
        points + len(likely),
        ask.grid,
        steps,
        ask.again,
        unit,
        max(1, -(-units // LEASES_WANTED)),
        ask.expected,
        None if ask.asked is None else [*ask.asked, *likely],
        len(likely),
        ask.adopted,
        ask.refine,
    )


def ask_again(folder: RunFolder, failed: Callable[[], list[int]]) -> None:
    """Publish a round that asks for failed points again, on the grid there is.

    Several ranks may do so at once: who finds that another round came first counts anew.
    """
    plan = Plan.read(folder)

    def compose(before: Rounds | None) -> Ask | None:
        points = failed()
        if before is None or not points:
            return None
        last, refine = before.last, before.last.refine
        if refine is not None and refine.state == Goal.DONE:  # decided without them
            refine = dataclasses.replace(refine, state=Goal.OPEN, audit={})
        return Ask(last.grid, last.expected, again=points, refine=refine)

    publish_round(folder, plan, compose)

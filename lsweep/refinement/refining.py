"""Refining: the round after one that is complete, decided from what is committed.

Whoever finds the last round complete decides. The values and the plan alone say which points are
asked; that the rest of the grid costs less than deciding hangs on the seconds of a point, too, and
so on which device classes are there by then. The first to publish has said it, and the published
file is the truth: who comes later finds a round more than it decided on, and publishes nothing.
"""

from __future__ import annotations

import math

import numpy as np

from lsweep.outcomes.estimates import estimate
from lsweep.outcomes.winners import Winners
from lsweep.plans.plan import Plan
from lsweep.plans.points import IntArray
from lsweep.plans.rounds import Goal, Refining, Rounds
from lsweep.refinement.asking import Ask, publish_round, split
from lsweep.refinement.audit import Sampler, audited
from lsweep.refinement.refine import Decision, Evaluated, decide
from lsweep.storage.files import readable
from lsweep.storage.folder import RunFolder

CHEAP = 1.0  # seconds of one worker; below it the whole grid costs less than deciding


def plan_next(
    folder: RunFolder, plan: Plan, rounds: Rounds, sampler: Sampler | None = None
) -> Rounds:
    """Publish the round that follows a complete one, unless someone else has.

    Args:
        folder: the run.
        plan: its plan.
        rounds: its rounds; the last refines and all its required points are done.
        sampler: by which a refinement is audited that turns out to be done; None: it is not.

    Returns:
        All rounds, as they are published.
    """
    known = len(rounds.all)

    def compose(before: Rounds | None) -> Ask | None:
        if before is None or len(before.all) != known:
            return None
        return _next(folder, plan, before, sampler)

    return publish_round(folder, plan, compose)


def _next(folder: RunFolder, plan: Plan, rounds: Rounds, sampler: Sampler | None) -> Ask:
    last = rounds.last
    goal, lattice = last.refine, last.lattice
    assert goal is not None
    numbers = rounds.numbers_of(lattice)
    left = int((numbers < 0).sum())
    seconds = _seconds(folder)
    if goal.error is None and left and left * seconds < CHEAP:
        why = f"all {left} points that are left take {left * seconds:.2g} s, less than deciding"
        return _dense(rounds, goal, None, why)
    known = evaluations(folder, plan, rounds, numbers)
    found = [
        decide(lattice, goal.tolerance, evaluated, log=name.endswith("_loss"))
        for name, evaluated in known.items()
    ]
    error = _finite(max(d.error for d in found))
    if reasons := [d.why for d in found if d.state == "dense"]:
        return _dense(rounds, goal, error, reasons[0])
    asked, adopted = split(rounds, numbers, _joined([d.ask for d in found if _is_open(d)]))
    likely, _ = split(rounds, numbers, _joined([d.likely for d in found if _is_open(d)]))
    taken = set(asked)
    likely = [i for i in likely if i not in taken]
    ends = not asked and not adopted  # also where all that is asked for has failed
    state = Goal.DONE if ends else Goal.OPEN
    audit = audited(lattice, known, plan.digest, sampler) if ends and sampler else {}
    refine = Refining(goal.tolerance, state, goal.held_out, error, audit=audit)
    return Ask(
        last.grid,
        last.expected,
        asked=asked,
        likely=[] if ends else likely,
        adopted=adopted,
        refine=refine,
    )


def _is_open(decision: Decision) -> bool:
    return decision.state == "open"


def _dense(rounds: Rounds, goal: Refining, error: float | None, why: str) -> Ask:
    """Ask for all that is left of the grid."""
    last = rounds.last
    refine = Refining(goal.tolerance, Goal.DENSE, goal.held_out, error, why)
    return Ask(last.grid, last.expected, adopted=rounds.optional_on(last.lattice), refine=refine)


def _seconds(folder: RunFolder) -> float:
    """Seconds of a point, waiting included, as the fastest device class has frozen them."""
    known = readable(folder.all_devices())
    return min((float(d["seconds_per_point"]) for d in known), default=math.inf)


def _finite(error: float) -> float | None:
    return float(error) if math.isfinite(error) else None  # it cannot be told yet


def _joined(lists: list[IntArray]) -> list[int]:
    """Several lists as one, each point where it comes first."""
    return list(dict.fromkeys(int(i) for one in lists for i in one))


def losses(plan: Plan) -> list[str]:
    """Return the variables that refinement looks at: losses, or the first where there is none."""
    names = zip(plan.variables, plan.variable_names, strict=True)
    return [name for (_, metric), name in names if metric == "loss"] or [plan.variable_names[0]]


def evaluations(
    folder: RunFolder, plan: Plan, rounds: Rounds, numbers: IntArray
) -> dict[str, Evaluated]:
    """Return what is known of each loss on a lattice, at required points alone.

    A point that failed has NaN: it was asked for, and has no value.

    Args:
        folder: the run.
        plan: of the run.
        rounds: of the run.
        numbers: for each point of the lattice its number, or -1.
    """
    known = estimate(folder, plan, rounds, Winners(folder, plan, rounds))
    indices = np.flatnonzero((numbers >= 0) & rounds.required[numbers])
    at = numbers[indices]
    held_out = np.isin(at, rounds.last.refine.held_out if rounds.last.refine else [])
    free = at < rounds.begun
    return {n: Evaluated(indices, known.values[n][at], held_out, free) for n in losses(plan)}

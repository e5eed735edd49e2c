"""Gaps: the points of a grid that a finished refinement left out, filled from those it evaluated.

A loss is interpolated on its log scale T, another metric as it is, and each value has its stated
error beside it: ``<name>_error``, a share of the range of T, which is what ``tolerance`` bounds,
and ``<name>_abs_error`` in the variable's own units. Both are 0 where a point was evaluated.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.plans.plan import Plan
from lsweep.plans.points import IntArray
from lsweep.plans.rounds import Goal, Rounds, describe_refining, stated_error
from lsweep.refinement.audit import contradictions, phrase
from lsweep.refinement.refine import Evaluated, Filled, fill
from lsweep.refinement.refining import losses
from lsweep.surfaces.surface import Status

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gaps:
    """What filling did.

    Attributes:
        words: for the report, after "N of M points evaluated, "; "" without refinement.
        facts: for the surface's provenance.
        check: what the interpolation check found, or why it was not made.
        caption: what a reader of the picture must know; "" where nothing is interpolated.
        contradictions: what the audit says against the stated error.
        attributes: of the variables that were added.
    """

    words: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    check: str = ""
    caption: str = ""
    contradictions: list[str] = field(default_factory=list)
    attributes: dict[str, dict[str, str]] = field(default_factory=dict)


def fill_gaps(
    values: dict[str, FloatArray],
    status: npt.NDArray[np.uint8],
    numbers: IntArray,
    rounds: Rounds,
    plan: Plan,
) -> Gaps:
    """Fill what was never asked, in place, where the refinement is done.

    Args:
        values: variable -> (points,) values on the lattice, NaN where there is none; the stated
            errors are added.
        status: (points,) `Status`; what is filled becomes interpolated.
        numbers: (points,) number of each point, or -1 where it was never asked.
        rounds: of the run.
        plan: of the run.
    """
    refine, lattice = rounds.last.refine, rounds.last.lattice
    if refine is None:
        return Gaps()
    facts = {**dataclasses.asdict(refine), "held_out": len(refine.held_out)}
    if refine.state == Goal.OPEN:
        return Gaps(f"refinement not finished: {describe_refining(refine)}", facts)
    if refine.state == Goal.DENSE:
        return Gaps(f"the whole grid: {refine.why}", facts)
    gaps = numbers < 0
    if not gaps.any():
        return Gaps("none interpolated", facts)
    indices = np.flatnonzero(~gaps & (status != Status.PENDING))
    held_out = np.isin(numbers[indices], refine.held_out)
    free = numbers[indices] < rounds.begun
    attributes, worst, blank, ranges = {}, {}, {}, {}
    for (split, metric), name in zip(plan.variables, plan.variable_names, strict=True):
        known = Evaluated(indices, values[name][indices], held_out, free)
        found = fill(lattice, known, log=name.endswith("_loss"))
        values[name][gaps] = found.values[gaps]
        for suffix, error, units, what in (
            ("error", found.error, "1", "(share of the log range)"),
            ("abs_error", found.margin, "percent" if metric == "accuracy" else "1", ""),
        ):
            stated = np.where(gaps, error, np.where(status == Status.PENDING, np.nan, 0.0))
            values[f"{name}_{suffix}"] = stated
            text = f"stated error of {split} {metric} {what}".strip()
            attributes[f"{name}_{suffix}"] = {"units": units, "split": split, "long_name": text}
        stated = values[f"{name}_error"][gaps]
        worst[name] = float(np.max(stated[np.isfinite(stated)], initial=0.0))
        ranges[name] = _range(found, worst[name])
        blank[name] = int(np.count_nonzero(~np.isfinite(stated)))
    status[gaps] = Status.INTERPOLATED
    facts |= {"evaluated": len(indices), "interpolated": int(gaps.sum()), "largest_error": worst}
    facts |= {"blank": blank}
    name = max(losses(plan), key=worst.__getitem__)
    without = max(blank[n] for n in losses(plan))
    words = f"the rest interpolated, {stated_error(worst[name], ranges[name])}"
    if without:
        words += f" ({without} left NaN, amid points without a value)"
    caption = f" {len(indices)} of {len(gaps)} points evaluated, {words}"
    check = phrase(refine.audit)
    caption += (f"; {check}" if check else "") + "."
    return Gaps(words, facts, check, caption, contradictions(refine.audit), attributes)


def _range(found: Filled, error: float) -> str:
    """Return of which range an error is a share, and how much that is in the variable itself."""
    if found.scale == "linear":
        return "of the range"
    if found.scale != "ln":  # asinh: no one factor
        return "of the log range"
    above = math.expm1(min(error * found.spread, 100.0))
    return f"of the log range, a factor of {1 + float(f'{above:.2g}'):.6g} in the loss"

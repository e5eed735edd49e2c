"""Estimates: from the sums of the rows that won to values, errors and outcomes, by point number.

What was evaluated ahead and is not required is left out here, for it is there by chance: nothing
that is decided or shown may depend on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.outcomes import variates
from lsweep.outcomes.reading import PartReader
from lsweep.outcomes.winners import Winners
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.storage.files import readable
from lsweep.storage.folder import RunFolder
from lsweep.storage.sums import SUMS, WD, WV, WW, WWD, WWDD, WWV, WWVV, W, standard_error
from lsweep.surfaces.surface import Status

FloatArray = npt.NDArray[np.float64]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Estimates:
    """What is known of every point, by the number under which it was first asked.

    Attributes:
        values: variable, ``NAME_se`` and ``NAME_diff_se`` -> (points,) float64; NaN where there is
            none.
        status: (points,) `Status`.
        opaque: the variables that are means over batches, without standard errors.
        sampling: what `lsweep.outcomes.variates` did.
    """

    values: dict[str, FloatArray]
    status: ByteArray
    opaque: set[str]
    sampling: dict[str, dict[str, Any]]


def estimate(folder: RunFolder, plan: Plan, rounds: Rounds, winners: Winners) -> Estimates:
    """Sum up the rows that won.

    Args:
        folder: the run.
        plan: its plan.
        rounds: its rounds.
        winners: whose sums were not yet read.
    """
    opaque = _opaque(folder, winners.readers)
    nothing = np.empty((0, len(plan.variables), len(SUMS)))
    values = {n: np.full(rounds.total, np.nan) for n in _variables(nothing, plan, opaque)}
    for points, sums in winners.totals():
        for name, found in _variables(sums, plan, opaque).items():
            values[name][points] = found
    status = _whole(winners.status)
    status[~rounds.required] = Status.PENDING
    finite = np.logical_and.reduce([np.isfinite(values[n]) for n in plan.variable_names])
    # The value decides, not its slices: one whose labels are all ignored has a mean of 0/0.
    computed = (status == Status.OK) | (status == Status.NONFINITE)
    status[computed] = np.where(finite[computed], Status.OK, Status.NONFINITE)
    for value in values.values():
        value[~computed] = np.nan
    sampling = variates.correct(values, plan, _anchors(folder, winners.readers))
    return Estimates(values, status, opaque, sampling)


def _opaque(folder: RunFolder, parts: list[PartReader]) -> set[str]:
    """Return the variables that are batch means; recorded twice, as one record may be lost."""
    names = {v for p in parts for v in p.header.get("opaque", "").split()}
    return names.union(*(value["opaque"] for value in readable(folder.all_devices())))


def _anchors(folder: RunFolder, parts: list[PartReader]) -> list[dict[str, Any]]:
    """Return the anchors of the control variate; recorded twice, as one record may be lost."""
    headers = sorted((p.header.get("device_class", ""), p.header.get("anchor", "")) for p in parts)
    return [json.loads(text) for _, text in headers if text] + [
        value.get("anchor", {}) for value in readable(folder.all_devices())
    ]


def _whole(slices: ByteArray) -> ByteArray:
    """Return the outcome of points from that of their slices; one that failed is told first."""
    status: ByteArray = slices.max(axis=1)
    status[(slices == Status.PENDING).any(axis=1)] = Status.PENDING
    status[(slices == Status.FAILED).any(axis=1)] = Status.FAILED
    return status


def _variables(sums: FloatArray, plan: Plan, opaque: set[str]) -> dict[str, FloatArray]:
    values, errors = {}, {}
    for k, name in enumerate(plan.variable_names):
        s = sums[:, k]
        with np.errstate(invalid="ignore", divide="ignore"):
            values[name] = s[:, WV] / s[:, W]
        pointwise = plan.pointwise.get(name)
        if name in opaque or (pointwise and not pointwise.sampled):
            continue
        errors[f"{name}_se"] = standard_error(s[:, W], s[:, WW], s[:, WV], s[:, WWV], s[:, WWVV])
        if pointwise:
            continue
        errors[f"{name}_diff_se"] = standard_error(
            s[:, W], s[:, WW], s[:, WD], s[:, WWD], s[:, WWDD]
        )
    return values | errors

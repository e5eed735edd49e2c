"""Derived directions: eigenvectors of the Hessian and the gradient at the trained weights.

They come out of long sums, whose last bits differ between machines, so they are computed once, when
a run is planned, and stored in it; workers read them. Each is a unit vector times the norm of the
axis' filter-normalised random direction, so that an offset of 1 goes as far in every picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from lsweep.axes.directions import Directions
from lsweep.axes.families import random_direction
from lsweep.axes.noise import dtype_of
from lsweep.axes.vectors import Origin, ignored_names
from lsweep.derivatives.curvature import Eigenpair, eigenpair, extremes
from lsweep.derivatives.objective import Objective
from lsweep.derivatives.scientific import scipy
from lsweep.errors import LsweepError, PlanChanged
from lsweep.evaluating.evaluate import Evaluator
from lsweep.hosts.device import choose_device
from lsweep.plans.plan import Plan
from lsweep.plans.recipes import DERIVED, Recipe
from lsweep.plans.settings import Evaluation, Settings
from lsweep.problems.problem import Problem
from lsweep.problems.weights import State
from lsweep.storage.folder import RunFolder
from lsweep.storage.stored import read_arrays, store_arrays
from lsweep.storage.tables import plain

MADE = ("sha256", "stored")  # of a direction in a plan: what its recipe made


@dataclass(frozen=True)
class Derived:
    """A direction that was computed: its tensors, and what was found out on the way."""

    tensors: State
    facts: dict[str, Any]


def derive(
    settings: Settings, problem: Problem, origin: Origin, start: State
) -> dict[str, Derived]:
    """Compute the directions that derivatives give, on the best device here.

    Derivatives are those of the mean loss over the plan's first split, over the tensors that a
    random direction with the recipe's ``ignore`` and ``parameters`` moves.

    Args:
        settings: the sweep.
        problem: with the plan's subset of the data.
        origin: its trained weights.
        start: name -> tensor at offset 0, where that is not the network's own (a gauge).

    Returns:
        Axis -> tensors, with ``eigenvalue`` and ``residual`` (‖Hv - λv‖ / max|λ|) of an
        eigenvector and the ``loss`` at the centre, or ``slope``, the norm of the gradient; nothing
        for axes of other kinds.

    Raises:
        LsweepError: the loss cannot be differentiated, scipy is missing, or the gradient is zero.
    """
    asked = {a: r for a, r in settings.directions.items() if r.kind in DERIVED}
    if not asked:
        return {}
    for axis in (a for a, r in asked.items() if r.kind == "hessian"):
        scipy("sparse.linalg", f'directions.{axis}: kind = "hessian"')
    device = choose_device("auto")
    nowhere = Directions({}, (), {}, origin=start)
    with Evaluator(problem, _plainly(settings.evaluate), nowhere, device) as ev:

        def compute() -> dict[str, Derived]:
            return dict(_each(asked, ev, origin))

        return ev.fitted(compute, "the derivatives of the loss cannot be computed")


def store_derived(folder: RunFolder, directions: Mapping[str, State]) -> None:
    """Store derived directions in a run, before the plan that names them."""
    for axis, tensors in directions.items():
        store_arrays(folder, axis, as_arrays(tensors))


def read_derived(
    folder: RunFolder, plan: Plan, settings: Settings | None = None
) -> dict[str, State]:
    """Read the derived directions of a run, which are never computed anew.

    Raises:
        PlanChanged: ``settings`` asks for others.
        LsweepError: one is missing or damaged.
    """
    for axis, recipe in settings.directions.items() if settings else ():
        there = {k: v for k, v in plan.directions.get(axis, {}).items() if k not in MADE}
        if recipe.kind in DERIVED and there != plain(dataclasses.asdict(recipe)):
            raise PlanChanged(
                f"{folder.root} holds another plan: directions.{axis} has another recipe; restore "
                "it, or give a new folder with --run",
                f"directions.{axis}",
            )
    found = {a: read_arrays(folder, a, plan.directions[a]["stored"]) for a in plan.derived}
    return {a: {n: torch.from_numpy(t) for n, t in ts.items()} for a, ts in found.items()}


def as_arrays(tensors: State) -> dict[str, npt.NDArray[Any]]:
    """Return tensors as they are stored."""
    return {n: t.cpu().numpy() for n, t in tensors.items()}


def _plainly(evaluate: Evaluation) -> dict[str, Any]:
    """Return how the loss is evaluated for derivatives: over all samples, in full precision."""
    table: dict[str, Any] = plain(dataclasses.asdict(evaluate))
    precision = "float64" if evaluate.precision == "float64" else "float32"
    statistics = "eval" if evaluate.batch_norm == "recalibrate" else evaluate.batch_norm
    return {**table, "precision": precision, "batch_norm": statistics, "slices": 1}


def _each(
    asked: Mapping[str, Recipe], evaluator: Evaluator, origin: Origin
) -> Iterator[tuple[str, Derived]]:
    ends: dict[tuple[Any, ...], tuple[Eigenpair, Eigenpair]] = {}
    for axis, recipe in asked.items():
        still = set(ignored_names(recipe, origin))
        names = tuple(n for n in origin.parameters if n not in still)
        objective = evaluator.differentiating.objective(evaluator.splits[0], names)
        if recipe.kind == "gradient":
            unit, facts = _gradient(objective)
        else:
            which, key = recipe.eigenvector or 1, (names, recipe.seed)
            if abs(which) == 1:
                if key not in ends:
                    ends[key] = extremes(objective, seed=recipe.seed)
                pair = ends[key][0 if which > 0 else 1]
            else:
                pair = eigenpair(objective, which, seed=recipe.seed)
            unit, facts = pair.vector, _facts(pair, objective)
        if not bool(torch.isfinite(unit).all()):
            raise LsweepError(f"directions.{axis}: the {recipe.kind} is not finite at the centre")
        like = dataclasses.replace(recipe, kind="random", normalize="filter", eigenvector=None)
        length = random_direction(axis, like, origin).norm
        tensors = {
            n: (length * t.double()).to(dtype_of(origin.parameters[n])).cpu()
            for n, t in objective.split(unit).items()
        }
        yield axis, Derived(tensors, facts)


def _gradient(objective: Objective) -> tuple[Tensor, dict[str, Any]]:
    gradient = objective.gradient()
    slope = float(gradient.norm())
    if not slope:
        raise LsweepError("the gradient is zero at the centre: it gives no direction")
    return gradient / slope, {"slope": slope}


def _facts(pair: Eigenpair, objective: Objective) -> dict[str, Any]:
    facts = {"eigenvalue": pair.value, "residual": pair.residual, "converged": pair.converged,
             "loss": objective.value()}  # fmt: skip
    return {**facts, "note": objective.note} if objective.note else facts

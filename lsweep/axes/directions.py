"""Directions: recipes made into one tensor per parameter name.

A direction of a line, then of a plane: a line needs one, θ + x·δ; a plane two, θ + x·δ + y·η.
Every worker makes them anew from the recipe and compares fingerprints with the plan, so that no
array travels and none can differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lsweep.axes.families import Curved, Family, curved, moved_layers, random_direction
from lsweep.axes.noise import dtype_of
from lsweep.axes.trajectory import gram_matrix, mixture, principal_components, project
from lsweep.axes.vectors import (
    Direction,
    Origin,
    difference,
    dot,
    finish,
    ignored_names,
    weighted_sum,
)
from lsweep.errors import LsweepError
from lsweep.plans.recipes import DERIVED, INDEXES, STILL, Axis, Recipe
from lsweep.plans.settings import Settings
from lsweep.problems import weights
from lsweep.surfaces.reference import read_reference_directions

PARALLEL = 0.99
FOUND = (
    "eigenvalue",
    "residual",
    "converged",
    "loss",
    "slope",
    "note",
)  # facts of a derived direction
MARGIN = 0.1  # of the trajectory's extent, left free on each side of an automatic range
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """A checkpoint to show on the plane: its label and where to read it."""

    label: str
    path: Path


@dataclass(frozen=True)
class Directions:
    """All directions of a sweep with what is known about them.

    Attributes:
        axes: axis name -> direction.
        steps: checkpoints to show, in order.
        grid: axis name -> axis, every automatic range resolved.
        facts: axis name -> what the recipe found out (explained share, its null, ...).
        kinds: the kind of each axis, in order; empty where none is known.
        family: what the directions are at each replicate and layer; None where no axis counts any.
        layers: names of the layers that an axis counts.
        curved: what derivatives are taken over; None where no recipe says.
        origin: name -> tensor at offset 0, where that is not the network's own (a gauge).
    """

    axes: dict[str, Direction]
    steps: tuple[Step, ...]
    grid: dict[str, Axis]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    family: Family | None = None
    layers: tuple[str, ...] = ()
    curved: Curved | None = None
    origin: weights.State = field(default_factory=dict)

    @property
    def moving(self) -> tuple[int, ...]:
        """Places of the axes that move weights."""
        still = [k in STILL for k in self.kinds] or [False] * len(self.axes)
        return tuple(i for i, s in enumerate(still) if not s)

    def along(self, offsets: Sequence[float]) -> tuple[float, ...]:
        """Return a point's offsets with 0 along the axes that move nothing."""
        return tuple(o if i in self.moving else 0.0 for i, o in enumerate(offsets))

    def fingerprint(self, axis: str) -> str:
        """Return the sha256 of a direction; along replicates of the first two."""
        tensors = {n: t.float() for n, t in self.axes[axis].tensors.items()}
        if self.family is not None and tensors and "replicate" in self.kinds:
            second = self.family.at((1, -1))[list(self.axes).index(axis)]
            tensors |= {f"{n} of replicate 1": t.float() for n, t in second.items()}
        return weights.fingerprint(tensors)

    @property
    def gram(self) -> FloatArray:
        """(A, A) float64 inner products in weight space."""
        return gram_matrix(self.axes)

    def cosines(self) -> FloatArray:
        """(A, A) cosines between the directions."""
        gram = self.gram
        norms = np.sqrt(np.diag(gram))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = gram / np.outer(norms, norms)
        return np.where(np.outer(norms, norms) > 0, cosines, 0.0)


def _to(path: Path, recipe: Recipe, origin: Origin) -> Direction:
    everything = origin.everything
    state = weights.load_matching(path, everything)
    return finish(difference(state, everything), recipe, origin)


def _from_file(axis: str, recipe: Recipe, origin: Origin, path: Path) -> Direction:
    arrays = read_reference_directions(path)
    if axis not in arrays:
        raise LsweepError(f"{path} has no {axis}direction; it has {', '.join(sorted(arrays))}")
    given = arrays[axis]
    if len(given) == len(origin.parameters):
        names: tuple[str, ...] = tuple(origin.parameters)
    elif len(given) == len(origin.states):
        names = origin.states
    else:
        raise LsweepError(
            f"{path} holds {len(given)} tensors for {axis}; the network has "
            f"{len(origin.parameters)} parameters and {len(origin.states)} entries in its state"
        )
    everything, out = origin.everything, {}
    for name, array in zip(names, given, strict=True):
        if name not in everything:
            continue  # an integer buffer, such as a counter of batches: nothing depends on it
        like = everything[name]
        if tuple(array.shape) != tuple(like.shape):
            raise LsweepError(
                f"{path}: {axis} tensor for {name} has shape {tuple(array.shape)}, "
                f"the network's is {tuple(like.shape)}"
            )
        out[name] = torch.from_numpy(np.array(array)).to(dtype_of(like))
    return finish(out, recipe, origin)


def make_directions(
    settings: Settings,
    origin: Origin,
    base: Path,
    known: Mapping[str, Mapping[str, Any]] | None = None,
    derived: Mapping[str, weights.State] | None = None,
) -> Directions:
    """Make every direction of a sweep.

    Args:
        settings: the sweep.
        origin: the trained weights.
        base: folder of the TOML, which relative paths refer to.
        known: facts of the plan. Coefficients that come out of linear algebra differ in their
            last bits between machines, so they are computed once, when the plan is made.
        derived: axis -> tensors of the directions that `lsweep.preparing.derived` computed.

    Raises:
        LsweepError: a checkpoint is missing or does not fit, directions are parallel
            (|cos| > 0.99) or zero.
    """
    axes: dict[str, Direction] = {}
    facts: dict[str, dict[str, Any]] = {}
    steps: list[Step] = []
    spectra: dict[Recipe, list[dict[str, Any]]] = {}
    for axis, recipe in settings.directions.items():
        facts[axis] = {}
        remembered = (known or {}).get(axis, {})
        if recipe.kind == "random":
            axes[axis] = random_direction(axis, recipe, origin)
        elif recipe.kind in DERIVED:
            facts[axis] = {k: remembered[k] for k in FOUND if k in remembered}
            tensors = dict((derived or {})[axis])
            axes[axis] = Direction(tensors, ignored_names(recipe, origin))
        elif recipe.kind in STILL:
            axes[axis] = Direction({})
        elif recipe.kind == "to":
            path = base / str(recipe.checkpoint)
            axes[axis] = _to(path, recipe, origin)
            steps.append(Step(path.name, path))
        elif recipe.kind == "plane":
            position = list(settings.grid).index(axis)
            if position > 1:
                raise LsweepError(f'directions.{axis}: kind = "plane" spans x and y only')
            path = base / recipe.checkpoints[position]
            axes[axis] = _to(path, recipe, origin)
            steps.append(Step(path.name, path))
        elif recipe.kind == "pca":
            paths = weights.find_checkpoints(recipe.checkpoints, base)
            if "mix" in remembered:
                facts[axis] = dict(remembered)
            else:
                if recipe not in spectra:
                    count = len(settings.grid)
                    spectra[recipe] = principal_components(paths, recipe, origin, count)
                before = list(settings.directions.values())[: len(axes)]
                facts[axis] = spectra[recipe][before.count(recipe)]
            axes[axis] = mixture(paths, facts[axis]["mix"], recipe, origin)
            steps += [Step(p.stem, p) for p in paths if p not in {s.path for s in steps}]
        else:
            axes[axis] = _from_file(axis, recipe, origin, base / str(recipe.file))
    if settings.trajectory is not None:
        steps = [
            Step(p.stem, p) for p in weights.find_checkpoints(settings.trajectory.checkpoints, base)
        ]
    _orthogonalize(axes, settings, facts, known or {})
    recipes = settings.directions
    kinds = tuple(r.kind for r in recipes.values())
    layers = moved_layers(recipes, axes, origin) if "layer" in kinds else ()
    family = Family(recipes, axes, origin, layers) if set(kinds) & set(INDEXES) else None
    directions = Directions(axes, tuple(steps), dict(settings.grid), facts, kinds, family, layers)
    directions = replace(directions, curved=curved(recipes, origin))
    _refuse_degenerate(directions)
    return replace(directions, grid=_resolve_ranges(directions, settings, origin))


def _orthogonalize(
    axes: dict[str, Direction],
    settings: Settings,
    facts: dict[str, dict[str, Any]],
    known: Mapping[str, Mapping[str, Any]],
) -> None:
    """Gram-Schmidt: take from a direction what lies along the ones before it."""
    before: list[Direction] = []
    for axis, direction in axes.items():
        if settings.directions[axis].orthogonalize and before:
            factors = known.get(axis, {}).get("removed") or _least_squares(direction, before)
            facts[axis]["removed"] = factors
            terms = [direction.tensors, *(d.tensors for d in before)]
            rest = weighted_sum([1.0, *(-f for f in factors)], terms)
            moved = direction.statistics.union(*(d.statistics for d in before))
            direction = replace(direction, tensors=rest, statistics=moved)
            axes[axis] = direction
        before.append(direction)


def _least_squares(direction: Direction, others: list[Direction]) -> list[float]:
    gram = np.array([[dot(a.weights, b.weights) for b in others] for a in others])
    along = np.array([dot(direction.weights, b.weights) for b in others])
    return [float(f) for f in np.linalg.lstsq(gram, along, rcond=None)[0]]


def _refuse_degenerate(directions: Directions) -> None:
    names = list(directions.axes)
    for i in directions.moving:
        axis, direction = names[i], directions.axes[names[i]]
        if not direction.norm:
            raise LsweepError(
                f"the direction {axis} is zero: all that it could move is ignored or has norm zero"
            )
        if not math.isfinite(direction.norm):
            broken = weights.not_finite(direction.tensors) or "its norm overflows"
            raise LsweepError(f"the direction {axis} is not finite: {broken}")
    cosines = directions.cosines()
    for i, a in enumerate(names):
        for j in range(i):
            if abs(cosines[i, j]) > PARALLEL:
                raise LsweepError(
                    f"directions {names[j]} and {a} are parallel (cosine {cosines[i, j]:.4f}; at "
                    f"most {PARALLEL}): use another seed or checkpoint, or sweep a line"
                )


def _resolve_ranges(directions: Directions, settings: Settings, origin: Origin) -> dict[str, Axis]:
    counted = {
        axis: _layer_range(axis, settings.grid[axis], directions.layers)
        for axis, recipe in settings.directions.items()
        if recipe.kind == "layer"
    }
    settings = replace(settings, grid={**settings.grid, **counted})
    if all(axis.range != "auto" for axis in settings.grid.values()):
        return dict(settings.grid)
    everything = origin.everything
    spots = [[0.0] * len(settings.grid)]
    for step in directions.steps:
        state = weights.load_matching(step.path, everything)
        spots.append(list(project(state, origin, directions.axes).offsets))
    low, high = np.min(spots, axis=0), np.max(spots, axis=0)
    grid = {}
    for i, (name, axis) in enumerate(settings.grid.items()):
        if axis.range == "auto":
            room = MARGIN * (high[i] - low[i]) or 1.0
            bounds = (_three_digits(low[i] - room), _three_digits(high[i] + room))
            axis = replace(axis, range=bounds)
        grid[name] = axis
    return grid


def _layer_range(name: str, axis: Axis, layers: tuple[str, ...]) -> Axis:
    """Return an axis that counts no more layers than there are; all of them for ``auto``."""
    if axis.range == "auto":
        if len(layers) < 2:
            raise LsweepError(f"grid.{name}: the network has one layer that moves, no axis of them")
        return Axis((Decimal(0), Decimal(len(layers) - 1)), len(layers))
    if axis.count > len(layers):
        raise LsweepError(
            f"grid.{name}.count = {axis.count}: {len(layers)} layers move ({', '.join(layers[:3])}"
            f'{", …" if len(layers) > 3 else ""}); range = "auto" counts them all'
        )
    return axis


def _three_digits(value: float) -> Decimal:
    return Decimal(f"{value:.3g}")


def as_reference(directions: Directions, origin: Origin) -> dict[str, list[npt.NDArray[Any]]]:
    """Return the directions as the reference implementation stores them: arrays in order, no names.

    In the order of the parameters; in that of the state dict where a direction moves buffers. What
    a direction does not move is zero.
    """
    moved = {n for d in directions.axes.values() for n in d.tensors}
    names = tuple(origin.parameters) if moved <= set(origin.parameters) else origin.states
    everything = origin.everything

    def array(direction: Direction, name: str) -> npt.NDArray[Any]:
        if name in direction.tensors:
            return direction.tensors[name].numpy()
        shape = tuple(everything[name].shape) if name in everything else ()
        return np.zeros(shape, dtype=np.float32)

    return {axis: [array(d, n) for n in names] for axis, d in directions.axes.items()}

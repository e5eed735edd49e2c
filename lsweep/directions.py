"""Directions: recipes made into one tensor per parameter name.

A direction of a line, then of a plane: a line needs one, θ + x·δ; a plane two, θ + x·δ + y·η.
Every worker makes them anew from the recipe and compares fingerprints with the plan, so that no
array travels and none can differ.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lsweep import weights
from lsweep.errors import LsweepError
from lsweep.filters import count_zero_filters, is_norm, normalize
from lsweep.reference import read_reference_directions
from lsweep.settings import Axis, Recipe, Settings
from lsweep.weights import State

PARALLEL = 0.99
MARGIN = 0.1  # of the trajectory's extent, left free on each side of an automatic range
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Origin:
    """The trained weights as the directions see them, on the CPU.

    Attributes:
        parameters: name -> tensor; tied weights once.
        buffers: name -> floating-point tensor (batch-norm statistics).
        owners: parameter name -> the module that holds it.
        states: names in the order of ``model.state_dict()``.
    """

    parameters: State
    buffers: State
    owners: Mapping[str, nn.Module]
    states: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        """Read a model; its tensors are shared, not copied."""
        return cls(
            {n: p.detach().cpu() for n, p in weights.parameters_of(model).items()},
            {n: b.detach().cpu() for n, b in weights.buffers_of(model).items()},
            weights.owners_of(model),
            tuple(weights.canonical_name(n) for n in model.state_dict()),
        )

    @property
    def everything(self) -> State:
        """Parameters and buffers."""
        return {**self.parameters, **self.buffers}


@dataclass(frozen=True)
class Direction:
    """One vector in weight space; what is not in ``tensors`` does not move.

    Attributes:
        tensors: name -> float32 or float64 tensor, the shape of the parameter or buffer.
        ignored: names that ``ignore`` or ``parameters`` set to zero.
        zero_filters: how many filters have norm zero and so cannot move.
    """

    tensors: State
    ignored: tuple[str, ...] = ()
    zero_filters: int = 0

    @property
    def norm(self) -> float:
        """L2 norm over all tensors, in weight space."""
        return math.sqrt(dot(self.tensors, self.tensors))


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
    """

    axes: dict[str, Direction]
    steps: tuple[Step, ...]
    grid: dict[str, Axis]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def gram(self) -> FloatArray:
        """(A, A) float64 inner products in weight space."""
        tensors = [d.tensors for d in self.axes.values()]
        return np.array([[dot(a, b) for b in tensors] for a in tensors])

    def cosines(self) -> FloatArray:
        """(A, A) cosines between the directions."""
        gram = self.gram
        norms = np.sqrt(np.diag(gram))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(gram / np.outer(norms, norms))


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the inner product over common names in float64.

    >>> dot({"w": torch.ones(3)}, {"w": torch.ones(3), "b": torch.ones(1)})
    3.0
    """
    return math.fsum(
        float(torch.dot(a[n].double().flatten(), b[n].double().flatten())) for n in a if n in b
    )


def random_tensor(seed: int, axis: str, name: str, like: Tensor) -> Tensor:
    """Return N(0,1) noise from Philox keyed by (seed, axis, name), never from global state.

    >>> a = random_tensor(0, "x", "w", torch.zeros(2))
    >>> bool((a == random_tensor(0, "x", "w", torch.zeros(2))).all())
    True
    """
    key = hashlib.sha256(f"{seed}\0{axis}\0{name}".encode()).digest()[:16]
    bits = np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64))
    noise = np.random.Generator(bits).standard_normal(tuple(like.shape))
    return torch.from_numpy(np.asarray(noise)).to(_dtype(like))


def _dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _difference(state: State, origin: State) -> State:
    # In float64 first: two nearby float32 checkpoints differ in their last bits.
    return {n: (state[n].double() - t.double()).to(_dtype(t)) for n, t in origin.items()}


def ignored_names(recipe: Recipe, origin: Origin) -> tuple[str, ...]:
    """Return the parameters that the recipe's ``ignore`` and ``parameters`` hold still."""
    out = []
    for name, p in origin.parameters.items():
        still = not any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.parameters)
        if recipe.ignore == "bias+norm":
            still |= p.dim() <= 1 or is_norm(origin.owners[name])
        if still:
            out.append(name)
    if len(out) == len(origin.parameters):
        raise LsweepError(
            f"parameters = {list(recipe.parameters)} with ignore = {recipe.ignore!r} leaves nothing "
            f"to move; names are like {', '.join(list(origin.parameters)[:3])}"
        )
    return tuple(out)


def _finish(tensors: State, recipe: Recipe, origin: Origin) -> Direction:
    """Hold still what is to be ignored, then normalise, tensor by tensor."""
    ignored = set(ignored_names(recipe, origin))
    whole = recipe.parameters == ("*",)
    out, zeros = {}, 0
    for name, d in tensors.items():
        if name in ignored or (name in origin.buffers and not whole):
            continue
        if name in origin.parameters:
            module = origin.owners[name]
            out[name] = normalize(recipe.normalize or "none", d, origin.parameters[name], module)
            if recipe.normalize == "filter":
                zeros += count_zero_filters(origin.parameters[name], module)
        else:
            out[name] = d
    return Direction(out, tuple(n for n in origin.parameters if n in ignored), zeros)


def _random(axis: str, recipe: Recipe, origin: Origin) -> Direction:
    still = set(ignored_names(recipe, origin))
    noise = {
        n: random_tensor(recipe.seed, axis, n, p)
        for n, p in origin.parameters.items()
        if n not in still
    }
    return _finish(noise, recipe, origin)


def _to(path: Path, recipe: Recipe, origin: Origin) -> Direction:
    everything = origin.everything
    state = weights.load_matching(path, everything)
    return _finish(_difference(state, everything), recipe, origin)


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
        out[name] = torch.from_numpy(np.array(array)).to(_dtype(like))
    return _finish(out, recipe, origin)


def make_directions(
    settings: Settings,
    origin: Origin,
    base: Path,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> Directions:
    """Make every direction of a sweep.

    Args:
        settings: the sweep.
        origin: the trained weights.
        base: folder of the TOML, which relative paths refer to.
        known: facts of the plan. Coefficients that come out of linear algebra differ in their
            last bits between machines, so they are computed once, when the plan is made.

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
            axes[axis] = _random(axis, recipe, origin)
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
            if recipe not in spectra:
                spectra[recipe] = principal_components(paths, recipe, origin, len(settings.grid))
            position = sum(r == recipe for r in list(settings.directions.values())[: len(axes)])
            facts[axis] = dict(remembered) if "mix" in remembered else spectra[recipe][position]
            axes[axis] = _mixture(paths, facts[axis]["mix"], recipe, origin)
            steps += [Step(p.stem, p) for p in paths if p not in {s.path for s in steps}]
        else:
            axes[axis] = _from_file(axis, recipe, origin, base / str(recipe.file))
    if settings.trajectory is not None:
        steps = [
            Step(p.stem, p)
            for p in weights.find_checkpoints(settings.trajectory.checkpoints, base)
        ]
    _orthogonalize(axes, settings, facts, known or {})
    directions = Directions(axes, tuple(steps), dict(settings.grid), facts)
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
            direction = replace(direction, tensors=_sum([1.0, *(-f for f in factors)], terms))
            axes[axis] = direction
        before.append(direction)


def _least_squares(direction: Direction, others: list[Direction]) -> list[float]:
    gram = np.array([[dot(a.tensors, b.tensors) for b in others] for a in others])
    along = np.array([dot(direction.tensors, b.tensors) for b in others])
    return [float(f) for f in np.linalg.lstsq(gram, along, rcond=None)[0]]


def _sum(factors: list[float], terms: list[State]) -> State:
    """Return Σ factor·term over the union of names, added in order in float64."""
    out: State = {}
    for name, like in {n: t for term in terms for n, t in term.items()}.items():
        total = torch.zeros_like(like, dtype=torch.float64)
        for factor, term in zip(factors, terms, strict=True):
            if name in term:
                total += factor * term[name].double()
        out[name] = total.to(like.dtype)
    return out


def _refuse_degenerate(directions: Directions) -> None:
    names = list(directions.axes)
    for axis, direction in directions.axes.items():
        if not direction.norm:
            raise LsweepError(
                f"the direction {axis} is zero: all that it could move is ignored or has norm zero"
            )
        if not math.isfinite(direction.norm):
            raise LsweepError(f"the direction {axis} is not finite")
    cosines = directions.cosines()
    for i, a in enumerate(names):
        for j in range(i):
            if abs(cosines[i, j]) > PARALLEL:
                raise LsweepError(
                    f"directions {names[j]} and {a} are parallel (cosine {cosines[i, j]:.4f}; at "
                    f"most {PARALLEL}): use another seed or checkpoint, or sweep a line"
                )


def random_walk_null(steps: int, components: int) -> float:
    """Return the share of variance that the PCA of a pure random walk of ``steps`` steps explains.

    In many dimensions the Gram matrix of a centred walk is C·K·C with K_ij = min(i, j), so its
    eigenvalues need no simulation; two components tend to 6/π²·(1 + 1/4) = 76.0 %. J. Antognini,
    J. Sohl-Dickstein, *PCA of high dimensional random walks with comparison to neural network
    training*, NeurIPS 2018.

    >>> round(random_walk_null(400, 2), 3)
    0.76
    """
    index = np.arange(steps)
    walk = np.minimum.outer(index, index).astype(np.float64)
    center = np.eye(steps) - 1 / steps
    spectrum = np.linalg.eigvalsh(center @ walk @ center)[::-1]
    total = float(spectrum.sum())
    return float(spectrum[:components].sum() / total) if total > 0 else 1.0


def _trajectory(paths: list[Path], recipe: Recipe, origin: Origin) -> list[State]:
    """Return the rows θ_i - θ, the last of them zero: θ itself ends the trajectory."""
    rows = []
    for path in paths:
        state = weights.load_matching(path, origin.parameters)
        rows.append(_finish(_difference(state, origin.parameters), recipe, origin).tensors)
    if dot(rows[-1], rows[-1]) > 0:
        rows.append({n: torch.zeros_like(t) for n, t in rows[0].items()})
    return rows


def _mixture(paths: list[Path], mix: list[float], recipe: Recipe, origin: Origin) -> Direction:
    rows = _trajectory(paths, recipe, origin)
    if len(rows) != len(mix):
        raise LsweepError(
            f"the plan's PCA is over {len(mix)} checkpoints, {len(rows)} are here: keep the files "
            "that the run was planned with"
        )
    return Direction(_sum(mix, rows), ignored_names(recipe, origin))


def principal_components(
    paths: list[Path], recipe: Recipe, origin: Origin, components: int
) -> list[dict[str, Any]]:
    """Return the leading principal components of a trajectory as mixtures of its checkpoints.

    Rows are θ_i - θ, centred, as in Li et al. section 7.2; their (T, T) Gram matrix gives unit
    components for any number of parameters.

    Returns:
        For each component ``mix``, its coefficients over the rows; ``explained``, its share of the
        variance, and ``random_walk_null``, the share that a walk without structure would have.

    Raises:
        LsweepError: the checkpoints span fewer than ``components`` directions.
    """
    if len(paths) < components:
        raise LsweepError(f"pca over {len(paths)} checkpoints: give at least {components}")
    rows = _trajectory(paths, recipe, origin)
    gram = np.array([[dot(a, b) for b in rows] for a in rows])
    center = np.eye(len(rows)) - 1 / len(rows)
    spectrum, vectors = np.linalg.eigh(center @ gram @ center)
    spectrum, vectors = spectrum[::-1], vectors[:, ::-1]
    if len(rows) <= components or spectrum[components - 1] <= 1e-12 * spectrum[0]:
        raise LsweepError(f"the checkpoints span fewer than {components} directions")
    out = []
    for k in range(components):
        mix = center @ vectors[:, k] / math.sqrt(spectrum[k])
        mix = mix if mix[np.argmax(np.abs(mix))] > 0 else -mix  # eigenvectors have no sign
        null = random_walk_null(len(rows), k + 1) - (random_walk_null(len(rows), k) if k else 0.0)
        out.append(
            {
                "mix": [float(m) for m in mix],
                "explained": float(spectrum[k] / spectrum.sum()),
                "random_walk_null": null,
                "checkpoints": len(paths),
            }
        )
    return out


@dataclass(frozen=True)
class Projection:
    """A checkpoint on the plane: (A,) least-squares offsets, distances in weight space."""

    offsets: tuple[float, ...]
    residual: float
    in_plane: float


def project(state: State, origin: Origin, directions: Directions) -> Projection:
    """Return where ``state`` lies: min over offsets of ||θ_state - θ - Σ offset·direction||.

    The directions need be neither unit nor orthogonal. Distances run over all parameters, and over
    buffers only where a direction moves them: statistics are not weights.
    """
    moved = {n for d in directions.axes.values() for n in d.tensors}
    names = {n: t for n, t in origin.everything.items() if n in origin.parameters or n in moved}
    delta = _difference(state, names)
    b = np.array([dot(d.tensors, delta) for d in directions.axes.values()])
    offsets = np.linalg.lstsq(directions.gram, b, rcond=None)[0]
    rest = {n: t.double().clone() for n, t in delta.items()}
    for offset, direction in zip(offsets, directions.axes.values(), strict=True):
        for n, t in direction.tensors.items():
            rest[n] -= float(offset) * t.double()
    residual = math.sqrt(dot(rest, rest))
    along = float(offsets @ directions.gram @ offsets)
    return Projection(tuple(map(float, offsets)), residual, math.sqrt(max(0.0, along)))


def _resolve_ranges(
    directions: Directions, settings: Settings, origin: Origin
) -> dict[str, Axis]:
    if all(axis.range != "auto" for axis in settings.grid.values()):
        return dict(settings.grid)
    everything = origin.everything
    spots = [[0.0] * len(settings.grid)]
    for step in directions.steps:
        state = weights.load_matching(step.path, everything)
        spots.append(list(project(state, origin, directions).offsets))
    low, high = np.min(spots, axis=0), np.max(spots, axis=0)
    grid = {}
    for i, (name, axis) in enumerate(settings.grid.items()):
        if axis.range == "auto":
            room = MARGIN * (high[i] - low[i]) or 1.0
            bounds = (_three_digits(low[i] - room), _three_digits(high[i] + room))
            axis = replace(axis, range=bounds)
        grid[name] = axis
    return grid


def _three_digits(value: float) -> Decimal:
    return Decimal(f"{value:.3g}")

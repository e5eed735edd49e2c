"""Trajectories: principal components beside their null, and checkpoints on a plane."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

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
from lsweep.plans.recipes import Recipe
from lsweep.problems import weights
from lsweep.problems.weights import State

FloatArray = npt.NDArray[np.float64]


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


def trajectory_rows(paths: list[Path], recipe: Recipe, origin: Origin) -> list[State]:
    """Return the rows θ_i - θ, the last of them zero: θ itself ends the trajectory."""
    rows = []
    for path in paths:
        state = weights.load_matching(path, origin.parameters)
        rows.append(finish(difference(state, origin.parameters), recipe, origin).tensors)
    if dot(rows[-1], rows[-1]) > 0:
        rows.append({n: torch.zeros_like(t) for n, t in rows[0].items()})
    return rows


def mixture(paths: list[Path], mix: list[float], recipe: Recipe, origin: Origin) -> Direction:
    """Return the direction Σ mix·row over the rows of a trajectory."""
    rows = trajectory_rows(paths, recipe, origin)
    if len(rows) != len(mix):
        raise LsweepError(
            f"the plan's PCA is over {len(mix)} checkpoints, {len(rows)} are here: keep the files "
            "that the run was planned with"
        )
    return Direction(weighted_sum(mix, rows), ignored_names(recipe, origin))


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
    rows = trajectory_rows(paths, recipe, origin)
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


def gram_matrix(axes: Mapping[str, Direction]) -> FloatArray:
    """Return the (A, A) float64 inner products of directions in weight space."""
    tensors = [d.weights for d in axes.values()]
    return np.array([[dot(a, b) for b in tensors] for a in tensors])


@dataclass(frozen=True)
class Projection:
    """A checkpoint on the plane: (A,) least-squares offsets, distances in weight space."""

    offsets: tuple[float, ...]
    residual: float
    in_plane: float


def project(state: State, origin: Origin, axes: Mapping[str, Direction]) -> Projection:
    """Return where ``state`` lies: min over offsets of ||θ_state - θ - Σ offset·direction||.

    The directions need be neither unit nor orthogonal. Distances run over all parameters and over
    no buffers, for statistics are not weights.
    """
    delta = difference(state, origin.parameters)
    gram = gram_matrix(axes)
    b = np.array([dot(d.weights, delta) for d in axes.values()])
    offsets = np.linalg.lstsq(gram, b, rcond=None)[0]
    rest = {n: t.double().clone() for n, t in delta.items()}
    for offset, direction in zip(offsets, axes.values(), strict=True):
        for n, t in direction.weights.items():
            rest[n] -= float(offset) * t.double()
    residual = math.sqrt(dot(rest, rest))
    along = float(offsets @ gram @ offsets)
    return Projection(tuple(map(float, offsets)), residual, math.sqrt(max(0.0, along)))

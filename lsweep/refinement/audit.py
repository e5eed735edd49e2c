"""The audit of a finished refinement: how far interpolated points are off, from a few samples.

At a few random points that nobody evaluated a few random samples are evaluated, and at the points
around them too: `lsweep.refinement.residuals` makes an unbiased estimate of the error there, with
its own standard error. It is told beside the error that refinement states, and contradicts it where
that was stated too small; nothing else depends on it. People read of it as the **interpolation
check**. It takes at most a twentieth of what the refinement itself evaluated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.plans.points import IntArray, Lattice
from lsweep.refinement.interpolate import Interpolant
from lsweep.refinement.refine import Evaluated, Filled, fill
from lsweep.refinement.residuals import Residuals, residuals

FloatArray = npt.NDArray[np.float64]

POINTS = 16
SAMPLES = 64
FEWEST = 16  # samples: below, a standard error means little
NEAR = 32  # evaluated points by which a point is interpolated here
SHARE = 0.05  # of the samples that the refinement evaluated, at most
BORNE_OUT = 0.8  # of the points: fewer contradict what is stated


class Sampler(Protocol):
    """Evaluates some samples of a variable's data, in place of all."""

    def count(self, name: str) -> int:
        """Return how many samples the variable is a mean over.

        Raises:
            LsweepError: why a few of them cannot stand for all.
        """
        ...

    def losses(self, name: str, samples: IntArray, offsets: FloatArray) -> FloatArray:
        """Return (K, m) values, so weighted that their mean over all samples is the variable's.

        Args:
            name: of the variable.
            samples: (m,) which, sorted.
            offsets: (K, axes) where.

        Raises:
            LsweepError: it cannot be evaluated.
        """
        ...


def audited(
    lattice: Lattice, known: Mapping[str, Evaluated], key: str, sampler: Sampler
) -> dict[str, Any]:
    """Audit what is interpolated.

    Args:
        lattice: the grid.
        known: variable -> what was evaluated of it.
        key: names the random choices; the plan's digest.
        sampler: evaluates samples.

    Returns:
        ``points``, C-order indices, and ``variables``: name -> ``left_out``, the reason, or
        ``samples``, ``of``, ``nodes``, and for each point ``mean`` and ``se`` of the variable less
        what is interpolated, and ``stated``, all in the variable's units (None where it is not
        finite after all); ``typical``, the root mean square error, and ``within``, the share of
        points whose stated error is borne out. Empty where nothing is interpolated.
    """
    points, filled = _chosen(lattice, known, key)
    if not len(points):
        return {}
    facts = {}
    for name, evaluated in known.items():
        try:
            facts[name] = _of_one(lattice, name, evaluated, points, filled[name], key, sampler)
        except LsweepError as e:
            facts[name] = {"left_out": str(e)}
    return {"points": points.tolist(), "variables": facts}


def _chosen(
    lattice: Lattice, known: Mapping[str, Evaluated], key: str
) -> tuple[IntArray, dict[str, Filled]]:
    """Return random points that all variables are interpolated at, and the interpolants there."""
    rest = np.ones(len(lattice), dtype=bool)
    for evaluated in known.values():
        rest[evaluated.indices] = False
    index = np.flatnonzero(rest)
    # Some may lie where nothing is finite.
    index = _chance(f"points {key}").choice(index, min(4 * POINTS, len(index)), replace=False)
    filled = {
        name: fill(lattice, evaluated, log=name.endswith("_loss"), only=index)
        for name, evaluated in known.items()
    }
    for f in filled.values():
        index = index[np.isfinite(f.values[index]) & np.isfinite(f.margin[index])]
    return np.sort(index[:POINTS]), filled


def _of_one(
    lattice: Lattice,
    name: str,
    evaluated: Evaluated,
    points: IntArray,
    filled: Filled,
    key: str,
    sampler: Sampler,
) -> dict[str, Any]:
    total = sampler.count(name)
    finite = np.isfinite(evaluated.values)
    nodes, coefficients = _interpolant(lattice, evaluated.indices[finite], points)
    values = evaluated.values[finite][nodes]
    nodes = evaluated.indices[finite][nodes]
    spots = lattice.offsets(np.concatenate([points, nodes]))
    count = min(SAMPLES, int(SHARE * len(evaluated.indices) * total / len(spots)))
    if count < FEWEST:
        raise LsweepError(
            f"{FEWEST} of {total} samples would be more than {SHARE:.0%} of what was evaluated"
        )
    samples = np.sort(_chance(f"samples {name} {key}").choice(total, count, replace=False))
    losses = sampler.losses(name, samples, spots)
    at, given = losses[: len(points)], losses[len(points) :]
    here = np.isfinite(at).all(axis=1)
    if not np.isfinite(given).all():
        raise LsweepError("at some evaluated points some samples are no longer finite")
    found: Residuals | None = None
    mean, se = np.full((2, len(points)), np.nan)
    if here.any():
        found = residuals(at[here], given, coefficients[here], of=total)
        found = found.of_another(filled.values[points[here]], coefficients[here] @ values)
        mean[here], se[here] = found.mean, found.se
    stated = filled.margin[points]
    within = Residuals(mean, se, 0.0).within(stated)  # what is not finite is not
    return {
        "samples": count,
        "of": total,
        "nodes": len(nodes),
        "mean": _plain(mean),
        "se": _plain(se),
        "stated": _plain(stated),
        "typical": None if found is None else found.typical,
        "within": float(within.mean()),
    }


def _interpolant(
    lattice: Lattice, evaluated: IntArray, points: IntArray
) -> tuple[IntArray, FloatArray]:
    """Return which evaluated points are near, (K,) positions, and (A, K) coefficients of each.

    Any coefficients give an unbiased estimate; good ones one that varies little.
    """

    def at(index: IntArray) -> FloatArray:
        along = np.unravel_index(index, lattice.shape)
        sizes = [max(1, n - 1) for n in lattice.shape]
        return np.stack([i / n for i, n in zip(along, sizes, strict=True)], axis=-1)

    nodes, spots = at(evaluated), at(points)
    squares = np.sum((spots[:, None] - nodes) ** 2, axis=-1)
    near = np.argsort(squares, axis=1, kind="stable")[:, :NEAR]
    used = np.unique(near)
    coefficients = np.zeros((len(points), len(used)))
    for a, some in enumerate(near):
        local = Interpolant(nodes[some], np.zeros(len(some)))
        coefficients[a, np.searchsorted(used, some)] = local.coefficients(spots[[a]])[0]
    return used, coefficients


def _chance(key: str) -> np.random.Generator:
    digest = hashlib.sha256(f"audit {key}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8")))


def _plain(values: FloatArray) -> list[float | None]:
    return [v if np.isfinite(v) else None for v in values.tolist()]


def phrase(audit: Mapping[str, Any], only: str | None = None) -> str:
    """Return in a few words what an audit found, of one variable only; "" where there was none.

    >>> facts = {"typical": 0.00212, "within": 1.0, "se": [1e-4, 1e-4], "stated": [0.01, 0.01]}
    >>> print(phrase({"points": [3, 8], "variables": {"train_loss": facts}}))
    interpolation check: 2 of 2 interpolated points within their stated error (typically 0.0021 off,
    stated 0.01, in train_loss)
    """
    total = len(audit.get("points", ()))
    words = [
        f"{round(f['within'] * total)} of {total} interpolated points within their stated error "
        f"(typically {_typical(f)} off, stated {_rms(f['stated']):.2g}, in {name})"
        for name, f in _done(audit).items()
        if f["typical"] is not None and only in (None, name)
    ]
    if words:
        return f"interpolation check: {'; '.join(words)}"
    reasons = dict.fromkeys(
        f["left_out"]
        for name, f in audit.get("variables", {}).items()
        if "left_out" in f and only in (None, name)
    )
    return f"interpolation check not made: {'; '.join(reasons)}" if reasons else ""


def _typical(facts: Mapping[str, Any]) -> str:
    """Return the typical error, or what it would have to exceed to be seen."""
    if facts["typical"]:
        return f"{facts['typical']:.2g}"
    return f"below {_rms(facts['se']):.2g}"


def _rms(values: Sequence[float | None]) -> float:
    found = np.array([v for v in values if v is not None])
    return float(np.sqrt(np.mean(found**2))) if len(found) else np.nan


def contradictions(audit: Mapping[str, Any]) -> list[str]:
    """Return a line for each variable whose stated error is not borne out.

    >>> facts = {"typical": 0.3, "within": 0.5, "mean": [0.1, 0.5], "se": [0.01, 0.01]}
    >>> contradictions({"points": [3, 8], "variables": {"train_loss": facts}})[0][:85]
    'interpolation check: at 1 of 2 interpolated points train_loss is further off than the'
    """
    total = len(audit.get("points", ()))
    out = []
    for name, facts in _done(audit).items():
        if facts["within"] < BORNE_OUT:
            bad = round((1 - facts["within"]) * total)
            typical = "" if facts["typical"] is None else f" (typically {facts['typical']:.2g})"
            out.append(
                f"interpolation check: at {bad} of {total} interpolated points {name} is further "
                f"off than the stated error{typical}: do not trust what is interpolated; a "
                "smaller tolerance evaluates more points"
            )
    return out


def _done(audit: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {n: f for n, f in audit.get("variables", {}).items() if "left_out" not in f}

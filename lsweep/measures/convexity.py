"""Convexity: where the plane curves downwards, and how much of that noise may have made.

The plane Hessian is taken by central differences; a point is not convex where -λ_min > 0.1 max|λ|
(Li et al. 2018, section 6, on the plane instead of all of weight space). That is exact for the
loss on the samples of the sweep. Whether it would be seen with other samples too is what the
**guard** asks: a point counts only if it is not convex with step h and with step 2h, and if
-λ_min exceeds 3 of its standard errors with one of the two.

The standard error: λ_min = Σ_i c_i L_i over the nine points of the stencil, c from the eigenvector,
Σ c_i = 0. The errors e_i at these points come from the same samples and are correlated, and the
correlations are not stored. For a second difference of points with equal σ it is

    Var(e₊ - 2e₀ + e₋) = σ² (6 - 8ρ(h) + 2ρ(2h)) ≤ 6σ²  whenever  ρ(h) ≥ ρ(2h)/4,

so treating the errors as independent, Σ c_i² σ_i², overstates them unless neighbours are
correlated less than a quarter as much as points twice as far apart. σ is `_se` or, because a
constant drops out of Σ c_i L_i, `_diff_se`: whichever gives less. On planes of two trained
networks (25 x 25 points, 50 to 1000 samples) this was 5 to 10 times the true error with step h and
2.5 to 4 with 2h (medians; 0.9 at the least): the guarded fraction is a lower bound, not a better
estimate of the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.measures.field import CERTAIN, Field
from lsweep.surfaces.surface import Surface

FloatArray = npt.NDArray[np.float64]
THRESHOLD = 0.1
ROUNDING = 64 * float(np.finfo(np.float64).eps)


def plane_hessian_extremes(
    z: FloatArray, x: FloatArray, y: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return both eigenvalues of the 2 x 2 Hessian of a plane, by central differences.

    Args:
        z: (ny, nx) values.
        x: (nx,) equidistant offsets.
        y: (ny,) equidistant offsets.

    Returns:
        (smaller, larger), each of shape (ny-2, nx-2): interior cells.

    >>> x = np.linspace(-1, 1, 5)
    >>> low, high = plane_hessian_extremes(np.add.outer(-(x**2), 2 * x**2), x, x)
    >>> bool(np.allclose(low, -2) and np.allclose(high, 4))
    True
    """
    xx, yy, xy = _second_differences(z, float(x[1] - x[0]), float(y[1] - y[0]))
    with np.errstate(invalid="ignore", over="ignore"):
        middle, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
        return middle - spread, middle + spread


def _around(z: FloatArray, reach: int) -> Callable[[int, int], FloatArray]:
    """Return a function (dy, dx) -> the neighbours there, ``reach`` points away, of all cells."""
    ny, nx = z.shape

    def neighbours(dy: int, dx: int) -> FloatArray:
        rows, columns = ((1 + d) * reach for d in (dy, dx))
        return z[rows : rows + ny - 2 * reach, columns : columns + nx - 2 * reach]

    return neighbours


def _second_differences(
    z: FloatArray, dx: float, dy: float, reach: int = 1
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return L_xx, L_yy, L_xy of the cells, each (ny - 2 reach, nx - 2 reach)."""
    at = _around(z, reach)
    dx, dy = reach * dx, reach * dy
    with np.errstate(invalid="ignore", over="ignore"):
        xx = (at(0, 1) - 2 * at(0, 0) + at(0, -1)) / dx**2
        yy = (at(1, 0) - 2 * at(0, 0) + at(-1, 0)) / dy**2
        xy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / (4 * dx * dy)
    return xx, yy, xy


def convexity_ratio(surface: Surface, name: str = "train_loss") -> FloatArray:
    """Return -λ_min / max|λ| of the plane Hessian at interior points, (ny-2, nx-2).

    Positive where the plane curves downwards in some direction; NaN next to a value that is not
    finite.

    Raises:
        LsweepError: the surface is no plane of at least 3 x 3 points.

    >>> x = np.linspace(-1, 1, 3)
    >>> convexity_ratio(Surface({"x": x, "y": x}, {"train_loss": np.subtract.outer(x**2, x**2)}))
    array([[1.]])
    """
    if len(surface.axes) != 2 or min(surface.shape) < 3:
        raise LsweepError(
            f"a non-convex fraction needs a plane of 3 x 3 points, not {surface.shape}"
        )
    return _ratio(surface[name], surface.x, surface.y)


def _ratio(z: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
    low, high = plane_hessian_extremes(z, x, y)
    step = min(x[1] - x[0], y[1] - y[0])
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        size = np.maximum(np.abs(low), np.abs(high))
        # A second difference below the rounding of float64 values is flat, and flat is convex.
        height = np.maximum.reduce(
            [np.abs(c) for c in (z[2:, 2:], z[:-2, :-2], z[2:, :-2], z[:-2, 2:])]
        )
        flat = size <= ROUNDING * height / step**2
        return np.where(flat, 0.0, -low / size)


def nonconvex_fraction(
    surface: Surface, name: str = "train_loss", threshold: float = THRESHOLD
) -> float:
    """Return the share of interior points whose plane Hessian has -λ_min / max|λ| > threshold.

    A lower bound of the true non-convexity: principal curvatures of a random plane are averages of
    the full ones (Li et al., section 6). Points next to a value that is not finite do not count.

    >>> x = np.linspace(-1, 1, 9)
    >>> saddle = Surface({"x": x, "y": x}, {"train_loss": np.subtract.outer(x**2, x**2)})
    >>> nonconvex_fraction(saddle)
    1.0
    """
    ratio = convexity_ratio(surface, name)
    known = np.isfinite(ratio)
    if not known.any():
        return float("nan")
    return float((ratio[known] > threshold).mean())


@dataclass(frozen=True)
class Nonconvexity:
    """How much of a plane is not convex, and how much of that is beyond noise.

    Attributes:
        plain: share of the ``cells`` that are not convex with step h; exact for these samples.
        guarded: share of the ``guarded_cells`` that are so with both steps and beyond 3 standard
            errors with one; NaN where the plane is too small for step 2h.
        agreeing: share of the ``guarded_cells`` that are so with both steps, noise aside.
        cells: interior points with all 8 neighbours.
        guarded_cells: those of them that have the 8 neighbours at distance 2h too.
        unsure: how many of the agreeing cells have no standard error: they count as noise.
        step: h, the smaller distance between neighbours, in offsets.
        threshold: on -λ_min / max|λ|.
        notes: what the numbers rest on.

    >>> x = np.linspace(-1, 1, 9)
    >>> saddle = Surface({"x": x, "y": x}, {"train_loss": np.subtract.outer(x**2, x**2)})
    >>> found = nonconvexity(saddle)
    >>> found.plain, found.guarded, found.cells, found.guarded_cells
    (1.0, 1.0, 49, 25)
    """

    plain: float
    guarded: float
    agreeing: float
    cells: int
    guarded_cells: int
    unsure: int
    step: float
    threshold: float
    notes: tuple[str, ...]


def nonconvexity(
    surface: Surface, name: str = "train_loss", threshold: float = THRESHOLD
) -> Nonconvexity:
    """Return the share of a plane that is not convex, plain and with the guard above.

    Where no standard error is stored at all (a loss without samples), the guard is the agreement
    of two steps alone, and a note says so.

    Args:
        surface: a plane of at least 3 x 3 points.
        name: the variable.
        threshold: a cell counts when -λ_min / max|λ| of its 2 x 2 Hessian is above.

    Raises:
        LsweepError: the surface is no plane of at least 3 x 3 points.
    """
    if len(surface.axes) != 2 or min(surface.shape) < 3:
        raise LsweepError(
            f"a non-convex fraction needs a plane of 3 x 3 points, not {surface.shape}"
        )
    field = Field.of(surface, name)
    z, notes = field.values, list(field.notes)
    near = _ratio(z, surface.x, surface.y)
    known = np.isfinite(near)
    plain = float((near[known] > threshold).mean()) if known.any() else float("nan")
    guarded = agreeing = float("nan")
    both = unsure = np.zeros((0, 0), bool)
    if min(surface.shape) < 5:
        notes.append("no guard: step 2h needs 5 points on each axis")
    else:
        far = np.full((z.shape[0] - 4, z.shape[1] - 4), np.nan)
        for rows, columns in np.ndindex(2, 2):  # every second point, from each of four corners
            part = _ratio(z[rows::2, columns::2], surface.x[columns::2], surface.y[rows::2])
            far[rows::2, columns::2] = part
        inner = near[1:-1, 1:-1]
        both = np.isfinite(inner) & np.isfinite(far)
        bent = both & (inner > threshold) & (far > threshold)
        seen, unsure = _beyond_noise(field, bent)
        if both.any():
            agreeing = float(bent[both].mean())
            guarded = float((bent & seen)[both].mean())
    if field.se is None and field.diff_se is None:
        notes.append("no standard error is known: the guard is the agreement of steps h and 2h")
    elif unsure.any():
        notes.append(f"{int(unsure.sum())} cells have no standard error and count as noise")
    return Nonconvexity(
        plain,
        guarded,
        agreeing,
        int(known.sum()),
        int(both.sum()),
        int(unsure.sum()),
        min(field.steps),
        threshold,
        tuple(notes),
    )


def _beyond_noise(
    field: Field, bent: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which bent cells exceed 3 standard errors with step h or 2h, and which have none."""
    errors = [e for e in (field.se, field.diff_se) if e is not None]
    if not errors:
        return bent, np.zeros(bent.shape, bool)
    seen, known = np.zeros(bent.shape, bool), np.zeros(bent.shape, bool)
    for reach in (1, 2):
        inside = (slice(2 - reach, reach - 2 or None),) * 2  # the cells that have both steps
        low = _lowest(field.values, field.steps, reach)
        found = np.fmin.reduce([low.error(e) for e in errors])[inside]
        known |= np.isfinite(found)
        with np.errstate(invalid="ignore"):
            seen |= -low.value[inside] > CERTAIN * found
    return bent & seen, bent & ~known


@dataclass(frozen=True)
class _Lowest:
    """λ_min of all cells as a combination of the values around them."""

    value: FloatArray
    weights: dict[tuple[int, int], FloatArray]
    reach: int

    def error(self, sigma: FloatArray) -> FloatArray:
        """Return sqrt(Σ c_i² σ_i²), NaN where one of them is."""
        at = _around(sigma, self.reach)
        with np.errstate(invalid="ignore", over="ignore"):
            square = sum((c * at(*where)) ** 2 for where, c in self.weights.items())
            return np.asarray(np.sqrt(square))


def _lowest(z: FloatArray, steps: tuple[float, ...], reach: int) -> _Lowest:
    dy, dx = steps
    xx, yy, xy = _second_differences(z, dx, dy, reach)
    # The eigenvector of λ_min stands at a right angle to that of λ_max, whose angle this is.
    angle = np.arctan2(2 * xy, xx - yy) / 2 + np.pi / 2
    a, b = np.cos(angle), np.sin(angle)
    dx, dy = reach * dx, reach * dy
    along, across, mixed = (a / dx) ** 2, (b / dy) ** 2, a * b / (2 * dx * dy)
    weights = {
        (0, 0): -2 * (along + across),
        (0, 1): along,
        (0, -1): along,
        (1, 0): across,
        (-1, 0): across,
        (1, 1): mixed,
        (-1, -1): mixed,
        (1, -1): -mixed,
        (-1, 1): -mixed,
    }
    return _Lowest((xx + yy) / 2 - np.hypot((xx - yy) / 2, xy), weights, reach)

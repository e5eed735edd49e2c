"""Central: the quadratic that fits a line or a plane best near its centre.

    L(p) ≈ a + g·p + ½ pᵀHp   by least squares over the points with |offset| ≤ radius on each axis

so the two curvatures are the eigenvalues of the 2 x 2 H, the plane's part of the full Hessian at
that radius: a finite rise and not a derivative. The residual tells whether a quadratic describes
the plane there at all. Exact on quadratics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lsweep.errors import LsweepError
from lsweep.measures.field import Field, FloatArray
from lsweep.surfaces.surface import Surface

REACH = 2
"""Points on each side of the centre that the fit takes by default."""


@dataclass(frozen=True)
class Central:
    """The quadratic at the centre.

    Attributes:
        largest: larger eigenvalue of H, per squared offset (on a line the only one).
        smallest: smaller eigenvalue of H.
        se: standard error of the curvatures, the root mean square over H's entries, from what
            the fit leaves over; NaN where as many points as unknowns leave nothing.
        anisotropy: max|λ| / min|λ|; infinite where one curvature is 0.
        gradient: ‖g‖ at the centre, per offset.
        minimum: offsets (x, y) or (x,) where the quadratic has its minimum; None where it has none.
        residual: root mean square of what is left, divided by that of the values around their
            mean: 0 is a perfect fit, 1 is no better than a constant.
        radius: of the fit, in offsets: the points within on every axis.
        points: how many points were fitted.
        notes: what the numbers rest on.

    >>> x = np.linspace(-1, 1, 9)
    >>> bowl = Surface({"x": x, "y": x}, {"train_loss": np.add.outer(8 * x**2, 2 * x**2 + x)})
    >>> found = central(bowl)
    >>> round(found.largest, 9), round(found.smallest, 9), round(found.gradient, 9), found.points
    (16.0, 4.0, 1.0, 25)
    """

    largest: float
    smallest: float
    se: float
    anisotropy: float
    gradient: float
    minimum: tuple[float, ...] | None
    residual: float
    radius: float
    points: int
    notes: tuple[str, ...]


def central(surface: Surface, name: str = "train_loss", radius: float | None = None) -> Central:
    """Fit the quadratic at the centre of a line or a plane.

    Args:
        surface: a line or a plane that contains its centre.
        name: the variable.
        radius: in offsets; None for two points on each side along the coarser axis.

    Raises:
        LsweepError: the surface has three axes, no centre, or too few points within the radius.
    """
    field = Field.of(surface, name, least=3)
    zero = field.zero
    if radius is None:
        radius = REACH * max(field.steps)
    grid = np.meshgrid(*field.offsets, indexing="ij")
    near = np.isfinite(field.values)
    for g in grid:
        near &= np.abs(g) <= radius * (1 + 1e-9)
    at = [g[near] / radius for g in reversed(grid)]  # x, then y; of order 1, so well conditioned
    matrix = _monomials(at)
    value = field.values[near] - zero
    solution, _, rank, _ = np.linalg.lstsq(matrix, value, rcond=None)
    if rank < matrix.shape[1]:
        raise LsweepError(
            f"{name}: {len(value)} points within {radius:g} of the centre do not determine a "
            "quadratic: give a larger radius or a finer grid"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # values near the end of float64
        return _told(field, matrix, value, np.asarray(solution, np.float64), radius)


def _monomials(at: list[FloatArray]) -> FloatArray:
    """Return (n, 3) 1, x, x²/2 or (n, 6) 1, x, y, x²/2, y²/2, xy."""
    columns = [np.ones(len(at[0])), *at, *(p**2 / 2 for p in at)]
    if len(at) == 2:
        columns.append(at[0] * at[1])
    return np.stack(columns, axis=1)


def _told(
    field: Field, matrix: FloatArray, value: FloatArray, solution: FloatArray, radius: float
) -> Central:
    axes = len(field.offsets)
    gradient = solution[1 : 1 + axes] / radius
    h = np.diag(solution[1 + axes : 1 + 2 * axes])
    if axes == 2:
        h[0, 1] = h[1, 0] = solution[5]
    h = h / radius**2
    lows = np.linalg.eigvalsh(h)
    left = value - matrix @ solution
    spread, freedom = float(np.std(value)), len(value) - matrix.shape[1]
    se = float("nan")
    if freedom > 0:
        covariance = np.linalg.inv(matrix.T @ matrix) * float(left @ left) / freedom
        se = float(np.sqrt(np.diag(covariance)[1 + axes :].mean())) / radius**2
    size = np.abs(lows)
    return Central(
        float(lows[-1]),
        float(lows[0]),
        se,
        float(size.max() / size.min()) if size.min() > 0 else float("inf"),
        float(np.linalg.norm(gradient)),
        tuple(float(v) for v in np.linalg.solve(h, -gradient)) if lows[0] > 0 else None,
        float(np.sqrt(np.mean(left**2))) / spread if spread else 0.0,
        radius,
        len(value),
        field.notes,
    )

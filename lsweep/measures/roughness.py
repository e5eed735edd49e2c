"""Roughness: how much a surface goes up and down, and how fast, at the resolution of its grid.

On T = log(1 + L), so that the decades of a rim do not hide the rest (where L < 0, the asinh scale):

    variation along a ray:   Σ_k |T_{k+1} - T_k| / (max T - min T)     1 where T is monotone,
                                                                       none where T is constant
    plane Lipschitz:         max ‖∇T‖, its 95 % quantile, max ‖∇²T‖₂    central differences

All of it grows with resolution where there is structure below the grid: the step h is part of the
number, and only equal steps compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lsweep.errors import LsweepError
from lsweep.measures.convexity import plane_hessian_extremes
from lsweep.measures.field import Field, FloatArray
from lsweep.measures.rays import rays
from lsweep.surfaces.surface import Surface

ROUNDING = 1e-14
"""Of a value: what interpolating along a ray adds to equal ones."""


@dataclass(frozen=True)
class Roughness:
    """How rough a line or a plane is.

    Attributes:
        variation: mean over rays of total variation / (max - min); NaN without a centre, and where
            all values are equal but for rounding.
        largest_variation: the largest of them.
        gradient: max ‖∇T‖ over interior points, per offset.
        gradient_95: its 95 % quantile.
        curvature: max ‖∇²T‖₂ over interior points, per squared offset: how fast the gradient
            changes, the gradient-Lipschitz constant of the plane.
        step: h, the smaller distance between neighbours, in offsets.
        scale: of T: ``log1p`` or ``asinh``.
        notes: what the numbers rest on.

    >>> x = np.linspace(-1, 1, 41)
    >>> slope = Surface({"x": x, "y": x}, {"train_loss": np.expm1(np.add.outer(3 * x, 4 * x) + 7)})
    >>> found = roughness(slope)
    >>> round(found.variation, 9), round(found.gradient, 9), round(found.curvature, 9)
    (1.0, 5.0, 0.0)
    """

    variation: float
    largest_variation: float
    gradient: float
    gradient_95: float
    curvature: float
    step: float
    scale: str
    notes: tuple[str, ...]


def roughness(surface: Surface, name: str = "train_loss") -> Roughness:
    """Return the roughness of a line or a plane with at least 3 points on each axis.

    Raises:
        LsweepError: the surface has three axes, fewer points, or no finite 3 x 3 points.
    """
    field = Field.of(surface, name, least=3)
    t, scale = field.drawn()
    notes = list(field.notes)
    flat = surface.constant(name)
    ratios = np.empty(0) if flat else _variations(field, t)
    if flat:
        notes.append("no variation along rays: the surface is constant to rounding")
    elif not len(ratios):
        notes.append("no variation along rays: the centre (offset 0) has no value")
    slope, bend = _derivatives(field, t)
    if not np.isfinite(slope).any():
        raise LsweepError(f"{name}: no point has a finite value on all sides of it")
    return Roughness(
        float(np.mean(ratios)) if len(ratios) else float("nan"),
        float(np.max(ratios)) if len(ratios) else float("nan"),
        float(np.nanmax(slope)),
        float(np.nanquantile(slope, 0.95)),
        float(np.nanmax(bend)) if np.isfinite(bend).any() else float("nan"),
        min(field.steps),
        scale,
        tuple(notes),
    )


def _variations(field: Field, t: FloatArray) -> FloatArray:
    """Return total variation / (max - min) of each ray that is not flat and has three values."""
    if field.center is None or not np.isfinite(t[field.center]):
        return np.empty(0)
    found = []
    for _, value, _ in rays(field, t):
        if len(value) > 2 and np.ptp(value) > ROUNDING * np.abs(value).max():
            found.append(np.abs(np.diff(value)).sum() / np.ptp(value))
    return np.array(found)


def _derivatives(field: Field, t: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return ‖∇T‖ and ‖∇²T‖₂ at interior points."""
    if t.ndim == 1:
        h = field.steps[0]
        bend = np.abs(t[2:] - 2 * t[1:-1] + t[:-2]) / h**2
        return np.abs(t[2:] - t[:-2]) / (2 * h), bend
    dy, dx = field.steps
    along = (t[1:-1, 2:] - t[1:-1, :-2]) / (2 * dx)
    across = (t[2:, 1:-1] - t[:-2, 1:-1]) / (2 * dy)
    low, high = plane_hessian_extremes(t, field.offsets[1], field.offsets[0])
    return np.hypot(along, across), np.maximum(np.abs(low), np.abs(high))

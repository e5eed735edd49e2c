"""Measures: numbers computed from a surface, without the network."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.surface import Status, Surface

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
    dx, dy = x[1] - x[0], y[1] - y[0]
    c = z[1:-1, 1:-1]
    with np.errstate(invalid="ignore", over="ignore"):
        xx = (z[1:-1, 2:] - 2 * c + z[1:-1, :-2]) / dx**2
        yy = (z[2:, 1:-1] - 2 * c + z[:-2, 1:-1]) / dy**2
        xy = (z[2:, 2:] - z[2:, :-2] - z[:-2, 2:] + z[:-2, :-2]) / (4 * dx * dy)
        middle, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
        return middle - spread, middle + spread


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
    z = surface[name]
    low, high = plane_hessian_extremes(z, surface.x, surface.y)
    step = min(surface.x[1] - surface.x[0], surface.y[1] - surface.y[0])
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


def measure(surface: Surface, name: str = "train_loss") -> dict[str, Any]:
    """Return what a surface alone tells about one metric.

    Of a refined surface most values are interpolated. What looks at neighbours is then computed
    from interpolated values, and that is said, with their stated error.

    Returns:
        ``center``, ``minimum``, ``minimum_at``, ``points``, ``finite`` (share), and for planes
        ``nonconvex_fraction``; of a refined surface also ``evaluated`` (how many points),
        ``values`` (what the numbers were computed from) and ``minimum_is``.

    >>> x = np.linspace(-1, 1, 5)
    >>> bowl = Surface({"x": x, "y": x}, {"train_loss": np.add.outer(x**2, x**2)})
    >>> measure(bowl)["nonconvex_fraction"]
    0.0
    """
    where, least = surface.minimum(name)
    out: dict[str, Any] = {
        "metric": name,
        "points": int(surface[name].size),
        "finite": float(np.isfinite(surface[name]).mean()),
        "center": surface.center(name),
        "minimum": least,
        "minimum_at": where,
    }
    if len(surface.axes) == 2 and min(surface.shape) >= 3:
        out["nonconvex_fraction"] = nonconvex_fraction(surface, name)
    if (surface.status == Status.INTERPOLATED).any():
        out |= _on_what(surface, name, where)
    return out


def _on_what(surface: Surface, name: str, where: dict[str, float]) -> dict[str, Any]:
    """Say that numbers rest on interpolated values, and how far those may be off."""
    error = surface.values.get(f"{name}_error")
    largest = float(np.nanmax(error)) if error is not None else float("nan")
    return {
        "evaluated": int(surface.evaluated.sum()),
        "values": f"mostly interpolated, stated error at most {largest:.2%} of the log range",
        "minimum_is": "evaluated" if surface.evaluated_at(where) else "interpolated",
    }

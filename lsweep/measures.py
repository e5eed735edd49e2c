"""Measures: numbers computed from a surface, without the network."""

from __future__ import annotations

from typing import Any

import numpy as np

from lsweep.convexity import nonconvex_fraction
from lsweep.surface import Status, Surface


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

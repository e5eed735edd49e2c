"""Rays: straight lines from the centre of a plane outwards, and the values along them.

Between points a value is interpolated bilinearly, on a line linearly. A ray ends at the border, or
at the last place that four finite values surround.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from lsweep.measures.field import Field, FloatArray

COUNT = 72
"""Rays of a plane: one every 5 degrees."""


def rays(
    field: Field, values: FloatArray, *, count: int = COUNT, per_step: int = 1
) -> Iterator[tuple[FloatArray, FloatArray, bool]]:
    """Yield (lengths, values, whole) of each ray; both arrays (m,), the first at the centre.

    Args:
        field: a line, which has two rays, or a plane; its centre is a point.
        values: what to follow, of the field's shape; NaN where there is none.
        count: rays of a plane, evenly spaced in angle, from the x axis on.
        per_step: places per distance between points (the smaller one of a plane).

    Yields:
        lengths in offsets; values there; whether the ray reached the border.

    >>> from lsweep.surfaces.surface import Surface
    >>> x = np.array([-1.0, 0.0, 1.0])
    >>> field = Field.of(Surface({"x": x}, {"a": np.array([3.0, 1.0, 2.0])}), "a")
    >>> [(r.tolist(), v.tolist(), w) for r, v, w in rays(field, field.values)]
    [([0.0, 1.0], [1.0, 2.0], True), ([0.0, 1.0], [1.0, 3.0], True)]
    """
    assert field.center is not None, "rays need a centre"
    if len(field.offsets) == 1:
        ways: list[tuple[float, ...]] = [(1.0,), (-1.0,)]
    else:
        angles = 2 * math.pi * np.arange(count) / count
        # Along an axis the other coordinate is 0 exactly, or the ray would leave a thin plane.
        ways = [(round(math.sin(a), 15), round(math.cos(a), 15)) for a in angles.tolist()]
    step = min(field.steps) / per_step
    for direction in ways:
        reach = min(
            (float(c[-1] if d > 0 else -c[0]) / abs(d)
             for c, d in zip(field.offsets, direction, strict=True) if d),
            default=0.0,
        )  # fmt: skip
        lengths = np.append(np.arange(0.0, reach * (1 - 1e-9), step), reach)
        found = _between(field, values, [lengths * d for d in direction])
        stop = np.flatnonzero(np.isnan(found))
        end = int(stop[0]) if len(stop) else len(lengths)
        yield lengths[:end], found[:end], end == len(lengths)


def _between(field: Field, values: FloatArray, at: list[FloatArray]) -> FloatArray:
    """Return the values at (m,) places between the points; NaN beside a gap that has weight."""
    lower, share = [], []
    for c, h, p in zip(field.offsets, field.steps, at, strict=True):
        index = np.clip((p - c[0]) / h, 0.0, len(c) - 1.0)
        whole = np.rint(index)
        index = np.where(np.abs(index - whole) < 1e-9, whole, index)
        low = np.minimum(index.astype(int), len(c) - 2)
        lower.append(low)
        share.append(index - low)
    total = np.zeros(len(at[0]))
    for corner in np.ndindex(*(2,) * len(at)):
        weight = np.ones(len(total))
        for s, k in zip(share, corner, strict=True):
            weight = weight * (s if k else 1.0 - s)
        value = values[tuple(low + k for low, k in zip(lower, corner, strict=True))]
        total += np.where(weight > 0, weight * value, 0.0)
    return total

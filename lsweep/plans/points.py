"""Lattices of offsets: exact coordinates, the order coarse to fine, and common points.

A lattice is a product of axes in the order x, y, z; its points are numbered in C order with x
fastest, so that point ``i`` of a plane has coordinates ``(x[i % nx], y[i // nx])``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from lsweep.plans.recipes import Axis

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def coordinates(axis: Axis) -> FloatArray:
    """Return the (count,) float64 nearest to the rationals ``lo + (hi - lo)·i/(count - 1)``.

    Bounds are read as decimals and the division is exact, so two grids that share a point share
    its float64 exactly, and the centre of a symmetric range is 0.

    >>> from decimal import Decimal
    >>> a = coordinates(Axis((Decimal("-0.3"), Decimal("0.3")), 7))
    >>> b = coordinates(Axis((Decimal("-0.3"), Decimal("0.3")), 13))
    >>> bool((a == b[::2]).all()), float(a[3])
    (True, 0.0)
    """
    low, high = axis.bounds
    # One common denominator makes this integer arithmetic; int / int rounds correctly in Python.
    step = (high - low) / (axis.count - 1)
    common = Fraction(low).denominator * step.denominator
    start, stride = int(low * common), int(step * common)
    return np.array([(start + stride * i) / common for i in range(axis.count)], dtype=np.float64)


class Lattice:
    """A grid of points; ``axes`` maps x, y, z to (n,) float64 coordinates.

    >>> lattice = Lattice({"x": np.array([0.0, 1.0]), "y": np.array([5.0, 6.0, 7.0])})
    >>> lattice.shape, lattice.offsets(np.array([3]))
    ((3, 2), array([[1., 6.]]))
    """

    def __init__(self, axes: Mapping[str, FloatArray]) -> None:
        self.axes = dict(axes)
        self.shape = tuple(len(c) for c in reversed(list(self.axes.values())))

    @classmethod
    def of(cls, grid: Mapping[str, Axis]) -> Lattice:
        """Make the lattice of a ``[grid]``."""
        return cls({name: coordinates(axis) for name, axis in grid.items()})

    def __len__(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def offsets(self, index: IntArray) -> FloatArray:
        """Return the (n, A) float64 offsets of C-order indices, columns in the order x, y, z."""
        unraveled = np.unravel_index(index, self.shape)[::-1]
        return np.stack([c[i] for c, i in zip(self.axes.values(), unraveled, strict=True)], axis=-1)

    def find(self, other: Lattice) -> IntArray:
        """Return for each point of ``other`` its C-order index here, or -1 where it is not here.

        >>> coarse = Lattice({"x": np.array([-1.0, 0.0, 1.0])})
        >>> coarse.find(Lattice({"x": np.array([0.0, 0.5, 1.0])}))
        array([ 1, -1,  2])
        """
        index = np.zeros((), dtype=np.int64)
        known = np.ones((), dtype=bool)
        for name in reversed(list(self.axes)):
            mine, theirs = self.axes[name], other.axes[name]
            at = np.clip(np.searchsorted(mine, theirs), 0, len(mine) - 1)
            index = index[..., None] * len(mine) + at
            known = known[..., None] & (mine[at] == theirs)
        return np.where(known, index, -1).ravel()

    def coarse_to_fine(self, one_by_one: Sequence[str] = ()) -> IntArray:
        """Return all C-order indices, level by level of integer bisection, so pictures come early.

        Args:
            one_by_one: axes along which one index after the other is done with, the first of them
                slowest: each may cost something to come to.

        >>> Lattice({"x": np.arange(5.0)}).coarse_to_fine()
        array([0, 4, 2, 1, 3])
        >>> Lattice({"x": np.arange(3.0), "y": np.arange(2.0)}).coarse_to_fine(["y"])
        array([0, 2, 1, 3, 5, 4])
        """
        level = np.zeros((), dtype=np.int64)
        for axis, n in zip(reversed(self.axes), self.shape, strict=True):
            levels = np.zeros(n, dtype=np.int64) if axis in one_by_one else bisection_levels(n)
            level = np.maximum(level[..., None], levels)
        # Levels are few, and a stable sort of single bytes takes linear time.
        order = np.argsort(level.astype(np.uint8).ravel(), kind="stable")
        if one_by_one:
            along = dict(zip(reversed(self.axes), np.unravel_index(order, self.shape), strict=True))
            order = order[np.lexsort([along[axis] for axis in reversed(one_by_one)])]
        return order.astype(np.int64, copy=False)


def bisection_levels(n: int) -> IntArray:
    """Return the (n,) level at which bisecting ``0..n-1`` first visits each index; the ends are 0.

    >>> bisection_levels(6)
    array([0, 2, 1, 2, 3, 0])
    """
    level = np.zeros(n, dtype=np.int64)
    spans, depth = [(0, n - 1)], 0
    while spans:
        depth += 1
        halves = []
        for a, b in spans:
            if b - a > 1:
                middle = (a + b) // 2
                level[middle] = depth
                halves += [(a, middle), (middle, b)]
        spans = halves
    return level

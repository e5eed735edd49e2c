"""What is known of one variable: the interpolant through it, κ, and the cells between its points.

Bisecting the index ranges gives cells of any count; a cell with an evaluated point inside is
split. The interpolant runs through all finite values on the log scale T, and κ, by which its scale
of error is multiplied, is such that it covers the **held-out** points: nothing but chance chose
those before any value was known, and each is left out in turn and predicted from all other points.
They serve as nodes for their neighbours all the same, so that where the surface surprised, other
points come near them: coverage elsewhere is measured (benchmarks/honesty.md), not proven.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lsweep.plans.points import Lattice, bisection_levels
from lsweep.refinement.interpolate import Interpolant
from lsweep.surfaces.scales import LINEAR, Transform, log_scale

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

COVERED = 0.95
"""The share of points whose true error the stated error is to cover."""
KAPPA = 2.5
"""κ at least: the scale is the mean of the |error|, and 95 % of a normal variable are within 2.5 of
that. From one refinement of a trained network to the next it would have to differ by a quarter,
which nothing that is known then tells beforehand: neither the number of points nor how all of them
predict one another (benchmarks/honesty.md)."""
STUCK = 0.5
"""Chaotic: four times the first points leave more than this share of their error."""
WHOLE = 20_000
"""Grids up to so many points are looked at everywhere."""
ENOUGH = 1200
"""Nodes above which points that were there before are thinned out, as another grid may have left
them by the hundred thousand; what is asked here always stays."""
FINEST = 64
"""Where finite values end is told to this part of an axis, or to a step where that is more: to a
step of a large grid it would take the points of its whole perimeter."""


@dataclass(frozen=True)
class Evaluated:
    """What is known of one variable.

    Attributes:
        indices: (n,) distinct C-order indices, in any order.
        values: (n,) float64 in the same order; NaN and Inf where the network gave them.
        held_out: (n,) bool, True for the points of `First.held_out`.
        free: (n,) bool, True for what was there before this refinement began; None: nothing was.
    """

    indices: IntArray
    values: FloatArray
    held_out: BoolArray
    free: BoolArray | None = None


@dataclass(frozen=True)
class Cell:
    """A box of indices without an evaluated point inside, and what is known on its border."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    finite: bool
    nonfinite: bool

    def points(self, parts: int, shape: tuple[int, ...]) -> IntArray:
        """Return the C-order indices that ``parts``, a power of two, equal steps make of it."""
        along = [
            np.unique([a + (b - a) * k // parts for k in range(parts + 1)])
            for a, b in zip(self.low, self.high, strict=True)
        ]
        return np.asarray(np.ravel_multi_index(np.meshgrid(*along, indexing="ij"), shape)).ravel()


class Known:
    """What is known of one variable, sorted, and the interpolant through it."""

    def __init__(self, lattice: Lattice, evaluated: Evaluated, log: bool) -> None:
        order = np.argsort(evaluated.indices)
        self.shape = lattice.shape
        self.index = np.asarray(evaluated.indices, np.int64)[order]
        self.values = np.asarray(evaluated.values, np.float64)[order]
        self.mask = np.zeros(len(lattice), bool)
        self.mask[self.index] = True
        self.finite = np.isfinite(self.values)
        free, held = evaluated.free, evaluated.held_out[order]
        self.free = np.zeros(len(order), bool) if free is None else free[order]
        taken = self.finite & self._thinned(self.free & ~held)
        self.nodes, self.held = self.index[taken], held[taken]
        values = self.values[self.finite]
        self.scale: Transform = LINEAR
        if log and len(values):
            centre = (lattice.offsets(self.index) == 0.0).all(axis=1)
            at_centre = float(self.values[centre][0]) if centre.any() else np.nan
            self.scale = log_scale(values, center=at_centre)
        transformed = self.scale.forward(values)
        self.transformed = transformed[taken[self.finite]]
        self.spread, self.factor = 1.0, KAPPA
        self.model: Interpolant | None = None
        if len(values):
            low, high = np.quantile(transformed, [0.02, 0.98])
            self.spread = float(high - low) or float(np.ptp(transformed)) or 1.0
        # Where all is evaluated there is nothing to predict, and the system would be large.
        if 2 * (len(self.shape) + 2) <= len(self.nodes) and not self.mask.all():
            self.model = Interpolant(self.at(self.nodes), self.transformed)
            self.factor = _factor(self.model.left_out()[self.held])

    def _thinned(self, spare: BoolArray) -> BoolArray:
        """Return which points may be nodes: what is not spare, and a coarse part of the rest.

        Args:
            spare: (n,) which of the evaluated points may be left out.
        """
        room = max(0, ENOUGH - int((self.finite & ~spare).sum()))
        along = np.unravel_index(self.index, self.shape)
        levels = [bisection_levels(n)[i] for n, i in zip(self.shape, along, strict=True)]
        level = np.max(levels, axis=0)
        counts = np.cumsum(np.bincount(level[self.finite & spare]))
        kept: BoolArray = ~spare | (level < np.searchsorted(counts, room, side="right"))
        return kept

    def at(self, index: IntArray) -> FloatArray:
        """Return (m, A) positions with axes of unit length."""
        along = np.unravel_index(index, self.shape)
        return np.stack(
            [i / max(1, n - 1) for i, n in zip(along, self.shape, strict=True)], axis=-1
        )

    def chaotic(self, tolerance: float, first: IntArray) -> bool:
        """Whether more points do not help: the held-out points are predicted no better than before.

        Args:
            tolerance: of the refinement error; what is predicted that well needs no more points.
            first: (n,) C-order indices of the sub-lattice of the first round.
        """
        assert self.model is not None
        begun = np.isin(self.nodes, first)
        if not self.held.any() or begun.sum() < 2 * (len(self.shape) + 2):
            return False
        if len(self.nodes) < 4 * begun.sum():
            return False
        before = Interpolant(self.at(self.nodes[begun]), self.transformed[begun])
        held = self.nodes[self.held]
        missed = np.abs(before.predict(self.at(held))[0] - self.transformed[self.held])
        misses = self.model.missed[self.held]
        was, now = float(np.median(missed)), float(np.median(misses))
        return now > max(STUCK * was, tolerance * self.spread)

    def stated(self, index: IntArray) -> FloatArray:
        """Return (m,) stated errors; the interpolant is there."""
        assert self.model is not None
        return self.factor * self.model.predict(self.at(index))[1] / self.spread

    def sequence(self, index: IntArray, aim: float, most: int) -> tuple[IntArray, int]:
        """Return ``most`` of ``index`` in the order they are wanted, and how many are needed."""
        assert self.model is not None
        limit = aim * self.spread / self.factor
        order, needed = self.model.sequence(self.at(index), limit, most)
        return index[order], needed

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells that bisection leaves, in a fixed order."""
        return list(self._split())

    def border(self) -> IntArray:
        """Return the bisection points that tell where finite values end."""
        if self.finite.all() or not self.finite.any():
            return np.empty(0, np.int64)
        mixed = [c for c in self.cells if c.finite and c.nonfinite]  # the narrow ones have corners
        return self._open([c.points(2 if self._is_wide(c) else 1, self.shape) for c in mixed])

    def _is_wide(self, cell: Cell) -> bool:
        sides = zip(cell.low, cell.high, self.shape, strict=True)
        return any(b - a > max(1, (n - 1) // FINEST) for a, b, n in sides)

    def open_corners(self) -> IntArray:
        """Return the bisection points of all cells with finite values."""
        return self._open([c.points(2, self.shape) for c in self.cells if c.finite])

    def probes(self) -> IntArray:
        """Return the points at which the stated error is looked at."""
        if self.finite.all() and len(self.mask) <= WHOLE:
            return np.flatnonzero(~self.mask)
        parts = 4 if len(self.mask) > WHOLE else 1 << int(max(self.shape)).bit_length()
        inside = [c.points(parts, self.shape) for c in self.cells if not c.nonfinite]
        return self._open(inside)

    def spoil(self, transformed: FloatArray, error: FloatArray) -> None:
        """Take back what the interpolant says of cells that hold nonfinite values."""
        if self.finite.all():
            return
        sound = np.zeros(self.shape, bool)
        unclear = np.zeros(self.shape, bool)
        for cell in self.cells:
            box = tuple(slice(a, b + 1) for a, b in zip(cell.low, cell.high, strict=True))
            if not cell.nonfinite:
                sound[box] = True
            elif cell.finite:
                unclear[box] = True
        transformed[~sound.ravel()] = error[~sound.ravel()] = np.nan
        error[(unclear & ~sound).ravel()] = np.inf

    def _open(self, points: list[IntArray]) -> IntArray:
        index = np.unique(np.concatenate([np.empty(0, np.int64), *points]))
        still: IntArray = index[~self.mask[index]]
        return still

    def _split(self) -> Iterator[Cell]:
        where = np.stack(np.unravel_index(self.index, self.shape), axis=-1)
        top = (0,) * len(self.shape), tuple(n - 1 for n in self.shape)
        stack = [(*top, np.arange(len(where)), True, False)]
        while stack:
            low, high, held, finite, nonfinite = stack.pop()
            a, b = np.array(low), np.array(high)
            at = where[held]
            held = held[((at >= a) & (at <= b)).all(axis=1)]
            if len(held):  # else its parent's word holds
                finite = bool(self.finite[held].any())
                nonfinite = not self.finite[held].all()
            at = where[held]
            inside = ((at > a) & (at < b)) | (b - a <= 1)
            wide = [high[k] - low[k] > 1 for k in range(len(low))]
            if not any(wide) or not inside.all(axis=1).any():
                yield Cell(low, high, finite, nonfinite)
                continue
            ranges = [
                [(p, (p + q) // 2), ((p + q) // 2, q)] if q - p > 1 else [(p, q)]
                for p, q in zip(low, high, strict=True)
            ]
            for box in itertools.product(*ranges):
                corner, far = tuple(r[0] for r in box), tuple(r[1] for r in box)
                stack.append((corner, far, held, finite, nonfinite))


def _factor(ratios: FloatArray) -> float:
    """Return κ from the |error| over scale with which the held-out points are predicted.

    That of n which a further one exceeds with a chance of 5 % at most, or the largest: the
    ⌈.95·(n + 1)⌉-th smallest (split conformal prediction, Lei et al. 2018, arXiv:1604.04173).
    """
    if not len(ratios):
        return KAPPA
    rank = min(len(ratios), math.ceil(COVERED * (len(ratios) + 1)))
    return max(KAPPA, float(np.sort(ratios)[rank - 1]))

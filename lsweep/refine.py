"""Refinement: which points a round asks next, and what is said of the points that nobody evaluates.

Values are looked at on the log scale T (linear for a metric that is not a loss). The **refinement
error** at a point is |T̂ − T| over (q98 − q2 of T on evaluated points), T̂ the `Interpolant` through
all evaluated points, and what is stated for it is κ times the interpolant's own scale. The factor
κ is read off the points themselves: each is left out in turn and predicted from all the others.

**Held-out** points, which nothing but chance chose before any value was known, keep κ honest: the
other points lie where the refinement wanted them, these lie where a reader looks. They may
serve as nodes for their neighbours all the same, for none is ever used to predict itself.

Whatever is stated to exceed the tolerance is asked, the largest stated error first, and each next
point knowing of those before it, for how the scale falls around a further node is known before
its value is. On large grids only some points are looked at: bisecting the index ranges gives cells
of any count, a cell with an evaluated point inside is split, and every cell that is left is probed
at the points of two further bisections. A surface of which half would be asked is asked whole.

Where the network gives NaN or Inf there is nothing to interpolate. A cell with finite and
nonfinite points is split down to single steps, so that the border of such a region is evaluated
exactly; a cell of which every evaluated point is nonfinite is taken to be so throughout: NaN.

Everything here is a function of the evaluated points as a set, so every process decides the same.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from lsweep.interpolate import Interpolant
from lsweep.points import Lattice, bisection_levels
from lsweep.scales import LINEAR, Transform, log_scale

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

HELD_OUT = 24
"""Random points asked beside the first sub-lattice; of small grids at most every tenth point."""
DEPTH = {1: 3, 2: 2, 3: 2}
"""Bisections that make the first sub-lattice, by the number of axes: 9, 5 x 5, 5 x 5 x 5."""
COVERED = 0.95
"""The share of points whose true error the stated error is to cover."""
MARGIN = 1.3
GUARD = 3
"""κ is at least the ratio of the GUARD-th worst held-out point."""
FLOOR = 1.5
AIM = 0.85
"""Refinement goes on until the stated error is below this share of the tolerance."""
GROWTH = 0.5
"""A round asks at most this share of what is evaluated already, for roughness is yet to be seen."""
LEAST = 0.06
"""And at least this share, for a round costs a barrier."""
WHOLE = 20_000
"""Grids up to so many points are looked at everywhere."""


@dataclass(frozen=True)
class First:
    """What is asked before anything is known; the two do not overlap.

    Attributes:
        asked: (n,) C-order indices of the coarse sub-lattice, ascending.
        held_out: (h,) C-order indices of random points, ascending.
    """

    asked: IntArray
    held_out: IntArray


@dataclass(frozen=True)
class Evaluated:
    """What is known of one variable.

    Attributes:
        indices: (n,) distinct C-order indices, in any order.
        values: (n,) float64 in the same order; NaN and Inf where the network gave them.
        held_out: (n,) bool, True for the points of `First.held_out`.
    """

    indices: IntArray
    values: FloatArray
    held_out: BoolArray


@dataclass(frozen=True)
class Decision:
    """What comes next.

    Attributes:
        state: ``done``: the stated error is below the tolerance everywhere; ``dense``: ``ask`` is
            all that is left; ``open``: ``ask`` is the next round.
        ask: (k,) C-order indices, most wanted first; never one that is evaluated.
        likely: (l,) what the round after it may ask, most wanted first; none of ``ask``.
        error: the largest stated refinement error, inf where it cannot be told yet.
    """

    state: Literal["open", "done", "dense"]
    ask: IntArray
    likely: IntArray
    error: float


@dataclass(frozen=True)
class Filled:
    """One variable on the whole lattice.

    Attributes:
        values: (N,) float64: what was evaluated, elsewhere the interpolant; NaN in regions of
            which every evaluated point is nonfinite.
        error: (N,) stated refinement error, a fraction of ``spread``: 0 at evaluated points, NaN
            where the value is not finite, inf where it cannot be told.
        margin: (N,) the same in units of the variable, the larger of its two sides.
        spread: q98 − q2 of T on evaluated points; 1 where that is 0.
        scale: ``ln``, ``asinh`` or ``linear``: what T is.
    """

    values: FloatArray
    error: FloatArray
    margin: FloatArray
    spread: float
    scale: str


def first_points(lattice: Lattice, seed: str) -> First:
    """Return the points of the first round.

    Args:
        lattice: the grid that is wanted in the end.
        seed: names the random choice; the plan's digest.

    Returns:
        The sub-lattice of the first bisections, and the held-out points; of a grid that is too
        small to refine all points and none.

    >>> first = first_points(Lattice({"x": np.arange(51.0), "y": np.arange(51.0)}), "plan")
    >>> len(first.asked), len(first.held_out), first.asked[:6]
    (25, 24, array([  0,  12,  25,  37,  50, 612]))
    """
    asked = _sub_lattice(lattice)
    if _too_small(lattice):
        return First(np.arange(len(lattice)), np.empty(0, np.int64))
    others = np.setdiff1d(np.arange(len(lattice)), asked, assume_unique=True)
    key = np.frombuffer(hashlib.sha256(f"held-out {seed}".encode()).digest()[:16], "<u8")
    random = np.random.Generator(np.random.Philox(key=key.astype(np.uint64)))
    count = min(HELD_OUT, len(lattice) // 10)
    return First(asked, np.sort(random.choice(others, count, replace=False, shuffle=False)))


def decide(
    lattice: Lattice, tolerance: float, evaluated: Evaluated, *, log: bool = True
) -> Decision:
    """Return what the next round asks for one variable.

    Args:
        lattice: the grid that is wanted in the end.
        tolerance: bound of the refinement error, a fraction of the spread of T.
        evaluated: all that is known; the same set in any order gives the same decision.
        log: T is the log scale; False: the value itself.

    >>> lattice = Lattice({"x": np.linspace(-1, 1, 51), "y": np.linspace(-1, 1, 51)})
    >>> first = first_points(lattice, "plan")
    >>> index = np.concatenate([first.asked, first.held_out])
    >>> plane = np.exp(lattice.offsets(index).sum(axis=1))
    >>> decide(lattice, 0.01, Evaluated(index, plane, np.arange(49) >= 25)).state
    'done'
    """
    known = _Known(lattice, evaluated, log)
    rest = np.flatnonzero(~known.mask)
    if not len(rest):
        return Decision("done", rest, rest, 0.0)
    nothing = rest[:0]
    dense = Decision("dense", rest, nothing, np.inf)
    if _too_small(lattice):
        return dense
    border = known.border()
    if known.model is None:
        ask = np.union1d(border, known.open_corners())
        return (
            Decision("open", ask, nothing, np.inf)
            if len(ask)
            else Decision("done", nothing, nothing, 0.0)
        )
    probes = known.probes()
    stated = known.stated(probes)
    error = np.inf if len(border) else float(stated.max(initial=0.0))
    if error <= AIM * tolerance:
        return Decision("done", nothing, nothing, error)
    most = max(8, int(GROWTH * len(known.index)))
    least = max(8, int(LEAST * len(known.index)))
    wanted = probes[np.argsort(-stated, kind="stable")[:4096]]
    order, needed = known.sequence(wanted, AIM * tolerance, most + most // 2)
    count = min(most, max(least, needed)) if needed else 0
    ask = np.concatenate([border, order[:count]])
    if 2 * (len(known.index) + len(ask)) > len(lattice):
        return Decision("dense", rest, nothing, error)
    return Decision("open", ask, order[count : max(needed, count)], error)


def fill(lattice: Lattice, evaluated: Evaluated, *, log: bool = True) -> Filled:
    """Return one variable on the whole lattice with the error that is stated for it.

    Args:
        lattice: the grid that is wanted.
        evaluated: all that is known of the variable.
        log: T is the log scale; False: the value itself.
    """
    known = _Known(lattice, evaluated, log)
    transformed = np.full(len(lattice), np.nan)
    error = np.full(len(lattice), np.nan)
    if known.model is not None:
        for start in range(0, len(lattice), WHOLE):
            here = np.arange(start, min(start + WHOLE, len(lattice)))
            transformed[here], scale = known.model.predict(known.at(here))
            error[here] = known.factor * scale / known.spread
        known.spoil(transformed, error)
    inverse = known.scale.inverse
    values = inverse(transformed)
    margin = np.maximum(
        inverse(transformed + error * known.spread) - values,
        values - inverse(transformed - error * known.spread),
    )
    values[known.index] = known.values
    error[known.index] = margin[known.index] = np.where(np.isfinite(known.values), 0.0, np.nan)
    return Filled(values, error, margin, known.spread, known.scale.name)


@dataclass(frozen=True)
class _Cell:
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


class _Known:
    """What is known of one variable, sorted, and the interpolant through it."""

    def __init__(self, lattice: Lattice, evaluated: Evaluated, log: bool) -> None:
        order = np.argsort(evaluated.indices)
        self.shape = lattice.shape
        self.index = np.asarray(evaluated.indices, np.int64)[order]
        self.values = np.asarray(evaluated.values, np.float64)[order]
        self.mask = np.zeros(len(lattice), bool)
        self.mask[self.index] = True
        self.finite = np.isfinite(self.values)
        values, nodes = self.values[self.finite], self.at(self.index[self.finite])
        self.scale: Transform = LINEAR
        if log and len(values):
            centre = (lattice.offsets(self.index) == 0.0).all(axis=1)
            at_centre = float(self.values[centre][0]) if centre.any() else np.nan
            self.scale = log_scale(values, center=at_centre)
        transformed = self.scale.forward(values)
        self.spread, self.factor = 1.0, FLOOR
        self.model: Interpolant | None = None
        if len(values):
            low, high = np.quantile(transformed, [0.02, 0.98])
            self.spread = float(high - low) or float(np.ptp(transformed)) or 1.0
        if len(values) >= 2 * (len(self.shape) + 2):
            self.model = Interpolant(nodes, transformed)
            self.factor = _factor(self.model.left_out(), evaluated.held_out[order][self.finite])

    def at(self, index: IntArray) -> FloatArray:
        """Return (m, A) positions with axes of unit length."""
        along = np.unravel_index(index, self.shape)
        return np.stack(
            [i / max(1, n - 1) for i, n in zip(along, self.shape, strict=True)], axis=-1
        )

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
    def cells(self) -> list[_Cell]:
        """The cells that bisection leaves, in a fixed order."""
        return list(self._split())

    def border(self) -> IntArray:
        """Return the bisection points that tell where finite values end."""
        if self.finite.all() or not self.finite.any():
            return np.empty(0, np.int64)
        return self._open([c.points(2, self.shape) for c in self.cells if c.finite and c.nonfinite])

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
        transformed[~(sound | unclear).ravel()] = error[~(sound | unclear).ravel()] = np.nan
        error[(unclear & ~sound).ravel()] = np.inf

    def _open(self, points: list[IntArray]) -> IntArray:
        index = np.unique(np.concatenate([np.empty(0, np.int64), *points]))
        return index[~self.mask[index]]

    def _split(self) -> Iterator[_Cell]:
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
                yield _Cell(low, high, finite, nonfinite)
                continue
            ranges = [
                [(p, (p + q) // 2), ((p + q) // 2, q)] if q - p > 1 else [(p, q)]
                for p, q in zip(low, high, strict=True)
            ]
            for box in itertools.product(*ranges):
                corner, far = tuple(r[0] for r in box), tuple(r[1] for r in box)
                stack.append((corner, far, held, finite, nonfinite))


def _factor(left_out: FloatArray, held_out: BoolArray) -> float:
    """Return κ from the ratios with which the nodes are predicted by one another."""
    factor = max(FLOOR, MARGIN * float(np.quantile(left_out, COVERED)))
    chance = np.sort(left_out[held_out])
    return max(factor, float(chance[-GUARD])) if len(chance) >= GUARD else factor


def _sub_lattice(lattice: Lattice) -> IntArray:
    depth = DEPTH[len(lattice.shape)]
    along = [np.flatnonzero(bisection_levels(n) <= depth) for n in lattice.shape]
    return np.asarray(
        np.ravel_multi_index(np.meshgrid(*along, indexing="ij"), lattice.shape)
    ).ravel()


def _too_small(lattice: Lattice) -> bool:
    return 3 * len(_sub_lattice(lattice)) >= len(lattice)

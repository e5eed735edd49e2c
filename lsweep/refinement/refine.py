"""Refinement: which points a round asks next, and what is said of the points that nobody evaluates.

Values are looked at on the log scale T (linear for a metric that is not a loss). The **refinement
error** at a point is |T̂ − T| over (q98 − q2 of T on evaluated points), T̂ the `Interpolant` through
all evaluated points, and what is stated for it is κ times the interpolant's own scale. The factor
κ is read off the evaluated points, see `lsweep.refinement.known`.

Whatever is stated to exceed the tolerance is asked, the largest stated error first, and each next
point knowing of those before it, for how the scale falls around a further node is known before
its value is. On large grids only some points are looked at: bisecting the index ranges gives cells
of any count, a cell with an evaluated point inside is split, and every cell that is left is probed
at the points of two further bisections. A surface of which half would be asked is asked whole.

Where the network gives NaN or Inf there is nothing to interpolate. A cell with finite and
nonfinite points is split down to single steps, of large grids to a 64th of an axis, so that the
border of such a region is told; what is left of it, and a cell of which every evaluated point is
nonfinite, is NaN.

Everything here is a function of the evaluated points as a set, so every process decides the same.
(Only `lsweep.refinement.refining` looks at seconds: whether to decide at all.)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lsweep.plans.points import Lattice, bisection_levels
from lsweep.refinement.known import WHOLE, Known
from lsweep.refinement.known import Evaluated as Evaluated

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

HELD_OUT = 48
"""Random points asked beside the first sub-lattice; of small grids at most every tenth point. They
are nodes, too, so that 48 instead of 24 cost nothing in the end: later rounds ask for fewer."""
DEPTH = {1: 3, 2: 2, 3: 2}
"""Bisections that make the first sub-lattice, by the number of axes: 9, 5 x 5, 5 x 5 x 5."""
AIM = 0.75
"""Refinement goes on until the stated error is below this share of the tolerance, for of all points
some are further off than is stated, and the tolerance is to bound those too."""
GROWTH = 0.3
"""A round asks at most this share of what is evaluated already, for roughness is yet to be seen:
with half of it, a tenth more points are asked in the end (benchmarks/honesty.md)."""
LEAST = 0.05
"""And at least this share, for a round costs a barrier."""
ROUGH = "the surface is too rough to be interpolated"
MOST_NODES = 4000
"""More evaluated points than one dense system should hold."""


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
class Decision:
    """What comes next.

    Attributes:
        state: ``done``: the stated error is below the tolerance everywhere; ``dense``: ``ask`` is
            all that is left; ``open``: ``ask`` is the next round.
        ask: (k,) C-order indices, most wanted first; never one that is evaluated.
        likely: (l,) what the round after it may ask, most wanted first; none of ``ask``.
        error: the largest stated refinement error, inf where it cannot be told yet.
        why: of ``dense``, as a sentence.
    """

    state: Literal["open", "done", "dense"]
    ask: IntArray
    likely: IntArray
    error: float
    why: str = ""


@dataclass(frozen=True)
class Filled:
    """One variable on the whole lattice.

    Attributes:
        values: (N,) float64: what was evaluated, elsewhere the interpolant; NaN in regions of
            which an evaluated point is nonfinite.
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
    (25, 48, array([  0,  12,  25,  37,  50, 612]))
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
    >>> decide(lattice, 0.01, Evaluated(index, plane, np.arange(73) >= 25)).state
    'done'
    """
    known = Known(lattice, evaluated, log)
    rest = np.flatnonzero(~known.mask)
    if not len(rest):
        return Decision("done", rest, rest, 0.0)
    nothing = rest[:0]
    if _too_small(lattice):
        return Decision("dense", rest, nothing, np.inf, "the grid is too small to be refined")
    border = known.border()
    if known.model is None:
        ask = np.union1d(border, known.open_corners())
        state: Literal["open", "done"] = "open" if len(ask) else "done"
        return Decision(state, ask, nothing, np.inf if len(ask) else 0.0)
    if known.chaotic(tolerance, _sub_lattice(lattice)):
        return Decision("dense", rest, nothing, np.inf, ROUGH)
    probes = np.setdiff1d(known.probes(), border, assume_unique=True)
    stated = known.stated(probes)
    error = np.inf if len(border) else float(stated.max(initial=0.0))
    if error <= AIM * tolerance:
        return Decision("done", nothing, nothing, error)
    nodes = len(known.nodes) + int((~known.finite).sum())
    most = max(8, int(GROWTH * nodes))
    least = max(8, int(LEAST * nodes))
    wanted = probes[np.argsort(-stated, kind="stable")[:4096]]
    order, needed = known.sequence(wanted, AIM * tolerance, most + most // 2)
    count = min(most, max(least, needed)) if needed else 0
    ask = np.concatenate([border, order[:count]])
    asked = int((~known.free).sum()) + len(ask)
    if 2 * asked > len(lattice) - int(known.free.sum()) or nodes + len(ask) > MOST_NODES:
        return Decision("dense", rest, nothing, error, ROUGH)
    return Decision("open", ask, order[count : max(needed, count)], error)


def fill(
    lattice: Lattice, evaluated: Evaluated, *, log: bool = True, only: IntArray | None = None
) -> Filled:
    """Return one variable on the whole lattice with the error that is stated for it.

    Args:
        lattice: the grid that is wanted.
        evaluated: all that is known of the variable.
        log: T is the log scale; False: the value itself.
        only: C-order indices at which to interpolate, elsewhere NaN; by default everywhere.
    """
    known = Known(lattice, evaluated, log)
    wanted = np.arange(len(lattice)) if only is None else only
    transformed = np.full(len(lattice), np.nan)
    error = np.full(len(lattice), np.nan)
    if known.model is not None:
        for start in range(0, len(wanted), WHOLE):
            here = wanted[start : start + WHOLE]
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


def _sub_lattice(lattice: Lattice) -> IntArray:
    depth = DEPTH[len(lattice.shape)]
    along = [np.flatnonzero(bisection_levels(n) <= depth) for n in lattice.shape]
    return np.asarray(
        np.ravel_multi_index(np.meshgrid(*along, indexing="ij"), lattice.shape)
    ).ravel()


def _too_small(lattice: Lattice) -> bool:
    return 3 * len(_sub_lattice(lattice)) >= len(lattice)

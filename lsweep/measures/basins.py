"""Basins: how far one can go from the centre before the loss has risen by c.

    A(c) = |component of {L ≤ L0 + c} that holds the centre| / |plane|
    w_θ  = inf {r : L(r cos θ, r sin θ) > L0 + c}

The area counts points, each for the cell that it owns (half of it on the border), and joins the
four nearest neighbours; the widths follow rays from the centre and interpolate between points, so
they resolve less than a cell. Both depend on the range that was swept: what reaches the border is
a lower bound. For L0 + a x² + b y² the area is π c / √(ab) and the width along x is √(c/a).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.measures.field import Field, FloatArray
from lsweep.measures.rays import rays
from lsweep.surfaces.surface import Surface
from lsweep.wording import counted

RISE = 0.5
FEWEST = 30
"""Cells below which an area says more of the lattice than of the basin."""
PER_STEP = 8


@dataclass(frozen=True)
class Basin:
    """The basin of the centre at one loss rise.

    Attributes:
        rise: c, in the metric's unit.
        share: A(c), of the plane or line that was swept.
        share_se: half the change of ``share`` when the values' differences to the centre move by
            one standard error all together, which is how errors of the same samples move; None
            where these errors are not known at every point, or where that moves no point of the
            lattice across the edge, as when the whole plane is basin.
        area: the same in squared offsets (in offsets on a line).
        cells: points of the component.
        border: the component reaches the border: ``share`` is a lower bound.
        least: the shortest ray to L0 + c, in offsets.
        median: the median ray, in offsets.
        rays: how many rays there are.
        open_rays: rays that end at the border or at a gap before; they count with their length.
        bounded: whether ``least`` and ``median`` are no lower bounds.
        notes: what the numbers rest on.

    >>> x = np.linspace(-1, 1, 41)
    >>> bowl = Surface({"x": x, "y": x}, {"train_loss": np.add.outer(8 * x**2, 2 * x**2)})
    >>> found = basin(bowl)
    >>> round(found.area, 2), round(np.pi * 0.5 / 4, 2), round(found.least, 3), found.border
    (0.39, 0.39, 0.25, False)
    """

    rise: float
    share: float
    share_se: float | None
    area: float
    cells: int
    border: bool
    least: float
    median: float
    rays: int
    open_rays: int
    bounded: bool
    notes: tuple[str, ...]


def basin(surface: Surface, name: str = "train_loss", rise: float = RISE) -> Basin:
    """Return area and widths of the basin of the centre at L0 + ``rise``.

    Args:
        surface: a line or a plane that contains its centre.
        name: the variable.
        rise: c > 0, in the metric's unit.

    Raises:
        LsweepError: the rise is not positive, the surface has three axes, or the centre no value.
    """
    if not rise > 0:
        raise LsweepError(f"a basin's rise is {rise:g}: it must be above 0")
    field = Field.of(surface, name, least=2)
    height = field.values - field.zero
    inside = _component(field, height <= rise)
    weight = _owned(field)
    share = min(float(weight[inside].sum()), 1.0)
    lengths, is_open = _widths(field, height, rise)
    at_least, median = float(lengths.min()), float(np.median(lengths))
    bounded = not is_open[lengths <= median].any()
    border, cells = _reaches_border(inside), int(inside.sum())
    notes = list(field.notes)
    if border:
        notes.append("the basin reaches the border: its area is a lower bound; widen the range")
    if cells < FEWEST and len(field.offsets) == 2:
        many = counted(cells, "point")
        notes.append(f"the basin has {many}, too coarse below {FEWEST}: refine the grid")
    if not bounded:
        notes.append(f"{int(is_open.sum())} of {len(lengths)} rays end before the loss has risen: "
                     "widths are lower bounds")  # fmt: skip
    return Basin(
        rise,
        share,
        _share_error(field, height, rise, weight),
        share * float(np.prod([c[-1] - c[0] for c in field.offsets])),
        cells,
        border,
        at_least,
        median,
        len(lengths),
        int(is_open.sum()),
        bounded,
        tuple(notes),
    )


def _component(field: Field, low: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the part of ``low`` that holds the centre, joined by nearest neighbours."""
    assert field.center is not None, "only a field with a centre has its basin"
    open_ = bytearray(np.pad(low, 1).tobytes())  # 1 where the flood may still go
    row = low.shape[-1] + 2
    around = (-1, 1) if low.ndim == 1 else (-1, 1, -row, row)
    start = int(np.ravel_multi_index([i + 1 for i in field.center], [n + 2 for n in low.shape]))
    found = bytearray(len(open_))
    waiting = [start]
    open_[start], found[start] = 0, 1
    while waiting:
        here = waiting.pop()
        for step in around:
            if open_[here + step]:
                open_[here + step], found[here + step] = 0, 1
                waiting.append(here + step)
    whole = np.frombuffer(found, np.bool_).reshape([n + 2 for n in low.shape])
    return np.asarray(whole[(slice(1, -1),) * low.ndim])


def _owned(field: Field) -> FloatArray:
    """Return the share of the plane that each point owns; together 1."""
    total = np.ones(())
    for c in field.offsets:
        own = np.ones(len(c))
        own[[0, -1]] = 0.5
        total = np.multiply.outer(total, own / own.sum())
    return total


def _share_error(field: Field, height: FloatArray, rise: float, weight: FloatArray) -> float | None:
    error = field.diff_se
    if error is None or np.isnan(error[np.isfinite(height)]).any():
        return None
    least, most = (_component(field, height + s * error <= rise) for s in (1, -1))
    if np.array_equal(least, most):
        return None  # it is finer than the lattice, or beyond the border: not known to be 0
    return float(abs(weight[most].sum() - weight[least].sum()) / 2)


def _reaches_border(inside: npt.NDArray[np.bool_]) -> bool:
    edges = (np.take(inside, k, axis) for axis in range(inside.ndim) for k in (0, -1))
    return any(bool(e.any()) for e in edges)


def _widths(
    field: Field, height: FloatArray, rise: float
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Return the length of each ray to its first crossing or its end, and which have none."""
    lengths, is_open = [], []
    for r, value, _ in rays(field, height, per_step=PER_STEP):
        beyond = np.flatnonzero(value > rise)
        is_open.append(not len(beyond))
        if not len(beyond):
            lengths.append(float(r[-1]))
            continue
        k = int(beyond[0])
        part = (rise - value[k - 1]) / (value[k] - value[k - 1])
        lengths.append(float(r[k - 1] + part * (r[k] - r[k - 1])))
    return np.array(lengths), np.array(is_open)

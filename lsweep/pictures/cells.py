"""Cells: a surface's plane as the cells around its points, each with its outcome, ready to draw.

Shapes: ``(ny, nx)`` as in `lsweep.surfaces.surface`; row j, column i belongs to ``(x[i], y[j])``.
This module imports no matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.surfaces.scales import FloatArray, Scale, number
from lsweep.surfaces.surface import Status, Surface

Mask = npt.NDArray[np.bool_]


def drawn_values(surface: Surface, name: str) -> FloatArray:
    """Return a variable with NaN at every pending point, whatever is stored there.

    >>> s = Surface({"x": np.zeros(2)}, {"a": np.array([1.0, 2.0])}, np.array([0, 1], np.uint8))
    >>> drawn_values(s, "a")
    array([nan,  2.])
    """
    return np.where(surface.status == Status.PENDING, np.nan, surface[name])


def as_plane(surface: Surface) -> Surface:
    """Return the plane that a picture shows: of three axes the one in the middle of z.

    The title then says which z; the trajectory, whose steps lie at other z, is left out.

    Raises:
        LsweepError: the surface is a line.

    >>> box = Surface({a: np.arange(3.0) for a in "xyz"}, {"a": np.arange(27.0).reshape(3, 3, 3)})
    >>> as_plane(box).title, as_plane(box)["a"][0, 0]
    ('loss landscape, z = 1', np.float64(9.0))
    """
    if len(surface.axes) == 1:
        raise LsweepError("a surface with one axis has no map: draw it with kind = 'line'")
    return surface if len(surface.axes) == 2 else _plane(surface, len(surface.z) // 2)


def plane_at(surface: Surface, z: float) -> Surface:
    """Return the plane of three axes whose z is nearest, of those with an evaluated point.

    Raises:
        LsweepError: the surface has no axis z, or z is outside of it.

    >>> box = Surface({a: np.arange(3.0) for a in "xyz"}, {"a": np.arange(27.0).reshape(3, 3, 3)})
    >>> plane_at(box, 1.8).title
    'loss landscape, z = 2'
    """
    if len(surface.axes) < 3:
        raise LsweepError(f"z = {z:g}: this surface has the axes {', '.join(surface.axes)} only")
    if not surface.z.min() <= z <= surface.z.max():
        raise LsweepError(
            f"z = {z:g}: z goes from {surface.z.min():g} to {surface.z.max():g}: give one within"
        )
    known: Mask = np.asarray(surface.evaluated.any(axis=(1, 2)))
    there = known if known.any() else ~known
    return _plane(surface, int(np.argmin(np.where(there, np.abs(surface.z - z), np.inf))))


def which_plane(surface: Surface) -> str:
    """Return what to say of the plane that a picture shows by itself: "" unless there are others.

    >>> box = Surface({a: np.arange(3.0) for a in "xyz"}, {"a": np.zeros((3, 3, 3))})
    >>> which_plane(box)
    ": the plane z = 1 of 3; 'lsweep render --at z=VALUE' draws another, '--at z=all' each"
    """
    if len(surface.axes) < 3:
        return ""
    z = number(float(surface.z[len(surface.z) // 2]))
    others = "'lsweep render --at z=VALUE' draws another, '--at z=all' each"
    return f": the plane z = {z} of {len(surface.z)}; {others}"


def _plane(surface: Surface, index: int) -> Surface:
    z = float(surface.z[index])
    return replace(
        surface,
        axes={"x": surface.x, "y": surface.y},
        values={n: v[index] for n, v in surface.values.items()},
        status=surface.status[index],
        attributes={**surface.attributes, "z": {"at": repr(z)}},
        trajectory=None,
        title=f"{surface.title}, z = {number(z)}",
    )


def pooled_scale(
    surfaces: Sequence[Surface],
    name: str,
    *,
    log: bool | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    whole: bool = False,
) -> Scale:
    """Return one `Scale` for a variable of several surfaces; L0 is their least value at a centre.

    With ``log`` None it is logarithmic where it spans over two decades and is not in per cent.
    If ``whole``, a log scale reaches up to the greatest value, for there that takes few colours.

    >>> s = Surface({"x": np.zeros(2)}, {"a": np.array([1.0, 2.0])})
    >>> pooled_scale([s], "a", vmax=5.0).levels(3)
    array([1., 3., 5.])
    """
    values = [drawn_values(s, name) for s in surfaces]
    if len(surfaces) == 1 and surfaces[0].constant(name):
        values = [values[0][np.isfinite(values[0])][:1]]  # rounding has no colours
    centers = np.array([s.center(name) for s in surfaces])
    centers = centers[np.isfinite(centers)]
    center = float(centers.min()) if len(centers) else float("nan")
    if log is None and all(in_per_cent(s, name) for s in surfaces):
        log = False
    # Of an error or an accuracy the highest is what one looks for.
    most = 1.0 if name.endswith(("_error", "_accuracy", "_acc")) else 0.98
    scaled = partial(Scale.of, values, center=center, vmin=vmin, vmax=vmax)
    scale = scaled(log=log, quantile=most)
    if whole and scale.transform.name != "linear":
        return scaled(log=True, quantile=1.0)
    return scale


def in_per_cent(surface: Surface, name: str) -> bool:
    """Whether a variable is a share in per cent, of which no log scale is made by itself."""
    return surface.attributes.get(name, {}).get("units") == "%" or name.endswith("_accuracy")


@dataclass(frozen=True)
class Cells:
    """A plane cut into cells.

    Attributes:
        x_edges, y_edges: (nx + 1,), (ny + 1,) edges between the cells, in offsets.
        t: (ny, nx) drawn quantity; NaN where pending or bad.
        pending: not evaluated, yet or at all, and without a value: left blank.
        bad: NaN, Inf or failed.
        failed: the bad ones that failed.

    >>> s = Surface({"x": np.arange(2.0), "y": np.arange(1.0)}, {"a": np.array([[1.0, np.inf]])})
    >>> cells = Cells.of(s, "a", Scale.of([s["a"]]))
    >>> cells.t, cells.bad, cells.x_edges
    (array([[ 1., nan]]), array([[False,  True]]), array([-0.5,  0.5,  1.5]))
    """

    x_edges: FloatArray
    y_edges: FloatArray
    t: FloatArray
    pending: Mask
    bad: Mask
    failed: Mask

    @classmethod
    def of(cls, surface: Surface, name: str, scale: Scale) -> Cells:
        """Return the cells of a variable, which own the space halfway to their neighbours."""
        value = drawn_values(surface, name)
        pending = ~surface.evaluated & ~np.isfinite(value)
        t = np.where(np.isfinite(value), scale.transform.forward(value), np.nan)
        low, _ = scale.limits
        t = np.where(np.isfinite(value) & ~np.isfinite(t), low - 1.0, t)  # ln of what vmin cut off
        bad = ~np.isfinite(value) & ~pending
        failed = bad & (surface.status == Status.FAILED)
        return cls(edges(surface.x), edges(surface.y), t, pending, bad, failed)

    def squares(self) -> Mask:
        """(ny - 1, nx - 1): whether all four points of a square are finite."""
        f = np.isfinite(self.t)
        return np.asarray(f[1:, 1:] & f[1:, :-1] & f[:-1, 1:] & f[:-1, :-1])

    def covered(self) -> Mask:
        """(ny, nx): whether a point is a corner of a complete square."""
        c = np.pad(self.squares(), 1)
        return np.asarray(c[1:, 1:] | c[1:, :-1] | c[:-1, 1:] | c[:-1, :-1])

    def quarters(self, surface: Surface, *, alone: bool = False) -> Cells:
        """The quarters of all squares, those of complete squares taken out (NaN, no mask).

        With ``alone`` only points without any complete square keep their value.
        """
        full = np.repeat(np.repeat(self.squares(), 2, 0), 2, 1)
        rows, columns = (np.repeat(np.arange(n), 2)[1:-1] for n in self.t.shape)
        pick = np.ix_(rows, columns)
        return Cells(
            _halves(surface.x),
            _halves(surface.y),
            np.where(full | (alone & self.covered()[pick]), np.nan, self.t[pick]),
            self.pending[pick],
            self.bad[pick] & ~full,
            self.failed[pick] & ~full,
        )

    def rectangles(self, chosen: Mask) -> FloatArray:
        """(n, 4, 2) corners of the chosen cells, the neighbours in a row joined."""
        found = []
        for j, row in enumerate(chosen):
            step = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(int)))
            for a, b in step.reshape(-1, 2):
                (x0, x1), (y0, y1) = self.x_edges[[a, b]], self.y_edges[[j, j + 1]]
                found.append([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        return np.array(found).reshape(-1, 4, 2)


def edges(at: FloatArray) -> FloatArray:
    """Return (n + 1,) edges of the cells around (n,) coordinates; a lone cell is 1 wide.

    >>> edges(np.array([0.0, 1.0, 3.0]))
    array([-0.5,  0.5,  2. ,  4. ])
    """
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middle = (at[1:] + at[:-1]) / 2
    return np.concatenate([[2 * at[0] - middle[0]], middle, [2 * at[-1] - middle[-1]]])


def _halves(at: FloatArray) -> FloatArray:
    """(2n - 1,) coordinates and the middles between them."""
    both = np.empty(2 * len(at) - 1)
    both[::2], both[1::2] = at, (at[1:] + at[:-1]) / 2
    return both

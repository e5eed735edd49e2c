"""Relief: a plane seen in three dimensions, heights and colours in units of T, see `scales`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgba
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from lsweep.errors import LsweepError
from lsweep.pictures.cells import Cells, Mask
from lsweep.pictures.maps import COLORS, FAILED, NONFINITE, finish, given, shades
from lsweep.pictures.marks import SMALL, Height, lengths
from lsweep.surfaces.scales import FloatArray, Scale, round_ticks
from lsweep.surfaces.surface import Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def relief(
    surface: Surface,
    name: str | None,
    ax: Axes,
    *,
    scale: Scale | None = None,
    bar: bool = True,
) -> Axes:
    """Draw the plane in three dimensions, heights and colours in T; arguments as in `heat`.

    A facet has the colour of its highest corner. What is above the scale is a plateau, drawn as a
    dark net; a log scale reaches up to the greatest value. Facets with a corner that is not finite
    are grey and join the surface: infinite corners are at the top, what has no value is on the
    floor. Points of incomplete squares are dots, or grey cells on the floor.

    Raises:
        LsweepError: ``ax`` is not three-dimensional.

    >>> from matplotlib.figure import Figure
    >>> s = Surface({"x": np.arange(3.0), "y": np.arange(2.0)}, {"a": np.arange(6.0).reshape(2, 3)})
    >>> relief(s, "a", Figure().add_subplot(projection="3d")).get_zlim()
    (np.float64(0.0), np.float64(5.0))
    """
    if not isinstance(ax, Axes3D):
        raise LsweepError("a relief needs ax = figure.add_subplot(projection='3d')")
    surface, name, scale = given(surface, name, scale, whole=True)
    cells = Cells.of(surface, name, scale)
    low, high = scale.limits
    t = np.clip(cells.t, low, high)
    ax.computed_zorder = False  # marks stay visible: in a bowl the wall would hide the minimum
    heights = np.where(cells.bad, np.where(np.isposinf(surface[name]), high, low), t)
    joined = _net(surface, ax, heights, cells, scale)
    single = min(surface.shape) < 2
    ends = [e if single else c for e, c in ((cells.x_edges, surface.x), (cells.y_edges, surface.y))]
    for mask, color in ((cells.bad & ~cells.failed, NONFINITE), (cells.failed, FAILED)):
        flat = cells.rectangles(mask & ~joined)
        flat = np.clip(flat, [e[0] for e in ends], [e[-1] for e in ends])
        floor = np.concatenate([flat, np.full((*flat.shape[:2], 1), low)], 2)
        if len(floor):
            ax.add_collection3d(Poly3DCollection(list(floor), facecolors=color, zorder=1))
    ax.set_xlim(ends[0][0], ends[0][-1])
    ax.set_ylim(ends[1][0], ends[1][-1])
    ax.set_zlim(low, high)
    sides = np.array(lengths(surface) or (1.0, 1.0))
    ax.set_box_aspect((*(sides / sides.max()), 0.62), zoom=1.0)
    ax.view_init(elev=32, azim=-58)
    tick, text = round_ticks(scale.low, scale.high, scale.transform, 6)
    ax.set_zticks(scale.transform.forward(tick), text)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_locator(MaxNLocator(4, prune="lower"))  # the corner belongs to x
    ax.tick_params(labelsize=SMALL + 0.5, pad=1)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.pane.set_alpha(0.0)
    return finish(surface, name, ax, scale, cells, bar, height=_height(surface, t))


def _net(surface: Surface, ax: Axes3D, z: FloatArray, cells: Cells, scale: Scale) -> Mask:
    """Add a facet for every square without a pending corner, and dots; return who has a facet."""
    y, x = np.meshgrid(surface.y, surface.x, indexing="ij")
    there, paint, high = ~np.isnan(z), ScalarMappable(shades(scale), COLORS), scale.limits[1]
    full = _corners(there).all(-1)
    corners = np.stack([_corners(c)[full] for c in (x, y, z)], -1)  # (n, 4, 3)
    if len(corners):
        bad, failed, above = (
            _corners(mask)[full].any(1) for mask in (cells.bad, cells.failed, cells.t > high)
        )
        face = paint.to_rgba(corners[..., 2].max(1))
        face[bad], face[failed] = to_rgba(NONFINITE), to_rgba(FAILED)
        edge = face.copy()
        edge[:, :3] *= 0.8
        above &= ~bad
        edge[above] = (0.19, 0.19, 0.19, 1.0)
        ax.add_collection3d(
            Poly3DCollection(
                list(corners),
                facecolors=face,
                edgecolors=edge,
                linewidths=np.where(above, 0.6, 0.25),
                shade=False,
                zorder=2,
            )
        )
    alone = np.isfinite(cells.t) & ~cells.covered()
    if alone.any():
        ax.scatter(
            x[alone], y[alone], z[alone],
            c=paint.to_rgba(z[alone]), s=14, depthshade=False, zorder=3,
        )  # fmt: skip
    held = np.pad(full, 1)
    return np.asarray(held[1:, 1:] | held[1:, :-1] | held[:-1, 1:] | held[:-1, :-1])


def _corners(at: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(ny - 1, nx - 1, 4) corners of every square, in turn around it."""
    return np.stack([at[:-1, :-1], at[:-1, 1:], at[1:, 1:], at[1:, :-1]], -1)


def _height(surface: Surface, t: FloatArray) -> Height:
    """Return the bilinear interpolation of t, NaN outside of the plane and beside blanks."""

    def height(x: FloatArray, y: FloatArray) -> FloatArray:
        (i, u), (j, v) = _place(surface.x, x), _place(surface.y, y)
        i1, j1 = np.minimum(i + 1, t.shape[1] - 1), np.minimum(j + 1, t.shape[0] - 1)
        parts = (
            ((1 - v) * (1 - u), t[j, i]),
            ((1 - v) * u, t[j, i1]),
            (v * (1 - u), t[j1, i]),
            (v * u, t[j1, i1]),
        )
        return np.asarray(sum(np.where(w == 0, 0.0, w * z) for w, z in parts))

    return height


def _place(grid: FloatArray, at: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Return the cell of the grid that holds a coordinate and where in it; NaN outside."""
    if len(grid) == 1:
        return np.zeros(len(at), np.intp), np.where(at == grid[0], 0.0, np.nan)
    i = np.clip(np.searchsorted(grid, at, "right") - 1, 0, len(grid) - 2)
    u = (at - grid[i]) / (grid[i + 1] - grid[i])
    return i, np.where((u >= 0) & (u <= 1), u, np.nan)

"""Bending: maps of |λmin/λmax|, of the plane's own 2 x 2 Hessian and of the whole one.

After Li et al. 2018, section 6. The whole Hessian is that of all weights that the sweep moves. The
plane's curvatures are averages of it: where the plane bends down so does the whole, and where the
plane does not, nothing follows. All maps have one scale, from 0 to 1, in bands that are about even
on a log scale: two pictures can be compared, and the threshold 0.1 is an edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from lsweep.measures.convexity import THRESHOLD, convexity_ratio
from lsweep.measures.from_children import Finished
from lsweep.pictures.cells import edges
from lsweep.pictures.maps import COLORS, NONFINITE
from lsweep.pictures.marks import SMALL, equal_aspect, label_axes, put_legend, put_title
from lsweep.plans.pointwise import CONVERGED
from lsweep.surfaces.scales import FloatArray
from lsweep.surfaces.surface import Status, Surface

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

BANDS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_PLAIN: dict[str, Any] = {"edgecolor": "#303030", "linewidth": 0.5}
NORM = BoundaryNorm(BANDS, matplotlib.colormaps[COLORS].N)


def of_plane(surface: Surface, name: str, ax: Axes) -> None:
    """Draw the map of the plane's own Hessian; the border has none."""
    ratio = np.clip(convexity_ratio(surface, name), 0.0, 1.0)
    _map(surface, ratio, ax, [], border=1)
    put_title(ax, f"Hessian of the plane, 2 x 2\n{_share(ratio)}")


def of_whole(child: Finished, ax: Axes) -> str:
    """Draw the map of the whole Hessian; return what the caption must say of it."""
    ratio = child.values("hessian_ratio")
    loose = np.zeros(ratio.shape, bool)
    for end in ("max", "min"):
        loose |= child.values(f"hessian_{end}_residual") > CONVERGED
    entries: list[Artist] = []
    if loose.any():
        j, i = np.nonzero(loose)
        style: dict[str, Any] = {"ls": "none", "marker": "x", "ms": 3.5, "mew": 0.8}
        ax.plot(child.surface.x[i], child.surface.y[j], color="white", zorder=4, **style)
        text = f"not converged ({int(loose.sum())} of {loose.size})"
        entries.append(Line2D([], [], color="black", label=text, **style))
    _map(child.surface, ratio, ax, entries)
    put_title(ax, f"whole Hessian\n{_share(ratio)}")
    return f"{int(loose.sum())} of {loose.size} eigenvalue pairs did not converge" * bool(
        loose.any()
    )


def _share(ratio: FloatArray) -> str:
    known = ratio[np.isfinite(ratio)]
    share = float((known > THRESHOLD).mean()) if len(known) else float("nan")
    return f"{share:.1%} above {THRESHOLD:g}"


def _map(
    surface: Surface, ratio: FloatArray, ax: Axes, entries: list[Artist], border: int = 0
) -> None:
    """Draw a ratio that the outermost ``border`` points have not; they stay blank."""
    x, y = (edges(c)[border : len(c) + 1 - border] for c in (surface.x, surface.y))
    known = np.isfinite(ratio)
    waiting = np.zeros(ratio.shape, bool) if border else surface.status == Status.PENDING
    options: dict[str, Any] = {"rasterized": True, "zorder": 0.6}
    ax.pcolormesh(x, y, np.ma.masked_invalid(ratio), cmap=COLORS, norm=NORM, **options)
    for mask, color, text in (
        (~known & ~waiting, NONFINITE, "no value"),
        (waiting, "white", "pending"),
    ):
        if mask.any():
            one = np.ma.masked_where(~mask, np.ones(ratio.shape))
            ax.pcolormesh(x, y, one, cmap=ListedColormap([color]), **options)
            count = f"{text} ({int(mask.sum())} of {mask.size})"
            entries.append(Patch(facecolor=color, label=count, **_PLAIN))
    if border:
        entries.append(Patch(facecolor="white", label="border: no second difference", **_PLAIN))
    for limits, c in ((ax.set_xlim, surface.x), (ax.set_ylim, surface.y)):
        limits(edges(c)[0], edges(c)[-1])
    equal_aspect(surface, ax)
    ax.tick_params(labelsize=SMALL + 1)
    ax.locator_params(nbins=5)
    label_axes(surface, ax)
    if x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]:
        halo = [withStroke(linewidth=3.2, foreground="white")]
        style: dict[str, Any] = {"color": "black", "ms": 12, "mew": 1.2, "path_effects": halo}
        entries[:0] = ax.plot([0.0], [0.0], "+", zorder=5, label="centre", **style)
    put_legend(ax, entries, letters=44)


def add_bands(axes: Sequence[Axes]) -> None:
    """Add the one scale of all maps beside the last, and show the same part of the plane in all."""
    for bounds, limits in (("get_xlim", "set_xlim"), ("get_ylim", "set_ylim")):
        ends = np.array([getattr(ax, bounds)() for ax in axes])
        for ax in axes:
            getattr(ax, limits)(ends[:, 0].min(), ends[:, 1].max())
    place = axes[-1].inset_axes((1.04, 0.0, 0.045, 1.0))  # as high as the map
    bar = axes[-1].figure.colorbar(ScalarMappable(NORM, COLORS), cax=place, spacing="uniform")
    bar.set_ticks(list(BANDS), labels=[f"{b:g}" for b in BANDS])
    bar.ax.tick_params(labelsize=SMALL + 1)
    bar.ax.set_ylabel("|λmin / λmax|, 0 where λmin > 0")

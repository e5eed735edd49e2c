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

from lsweep.cells import edges
from lsweep.convexity import THRESHOLD, convexity_ratio
from lsweep.from_children import CONVERGED, Finished
from lsweep.maps import COLORS, NONFINITE
from lsweep.marks import SMALL, equal_aspect, label_axes, put_legend, put_title
from lsweep.surface import Surface

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

from lsweep.scales import FloatArray

BANDS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
NORM = BoundaryNorm(BANDS, matplotlib.colormaps[COLORS].N)


def of_plane(surface: Surface, name: str, ax: Axes) -> None:
    """Draw the map of the plane's own Hessian; the border has none."""
    ratio = np.clip(convexity_ratio(surface, name), 0.0, 1.0)
    inner = np.full(surface.shape, np.nan)
    inner[1:-1, 1:-1] = ratio
    _map(surface, inner, ax, [])
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


def _map(surface: Surface, ratio: FloatArray, ax: Axes, entries: list[Artist]) -> None:
    x, y = edges(surface.x), edges(surface.y)
    known = np.isfinite(ratio)
    options: dict[str, Any] = {"rasterized": True, "zorder": 0.6}
    ax.pcolormesh(x, y, np.ma.masked_invalid(ratio), cmap=COLORS, norm=NORM, **options)
    if not known.all():
        grey = np.ma.masked_where(known, np.ones(ratio.shape))
        ax.pcolormesh(x, y, grey, cmap=ListedColormap([NONFINITE]), **options)
        count = f"no value ({int((~known).sum())} of {known.size})"
        entries.append(Patch(facecolor=NONFINITE, edgecolor="#303030", lw=0.5, label=count))
    equal_aspect(surface, ax)
    ax.tick_params(labelsize=SMALL + 1)
    ax.locator_params(nbins=5)
    label_axes(surface, ax)
    ax.plot([0.0], [0.0], "+", color="black", ms=12, mew=1.2, zorder=5)
    put_legend(ax, entries, letters=44)


def add_bands(axes: Sequence[Axes]) -> None:
    """Add the one scale of all maps, beside the last."""
    last = axes[-1]
    bar = last.figure.colorbar(
        ScalarMappable(NORM, COLORS), cax=last.inset_axes((1.04, 0.0, 0.045, 1.0)),
        spacing="uniform",
    )  # fmt: skip
    bar.set_ticks(list(BANDS), labels=[f"{b:g}" for b in BANDS])
    bar.ax.tick_params(labelsize=SMALL + 1)
    bar.ax.set_ylabel("|λmin / λmax|, 0 where λmin > 0")

"""Maps: flat pictures of a plane - contour, filled, heat; each takes and returns an Axes.

Every point owns the cell around it. Where a square of four points is complete, contours are drawn
in it; where it is not, each of its quarters is painted for the point it belongs to, so a partial
surface shows what is there: value in its colour, not finite and failed grey, pending left blank.
What lies outside the scale is hatched. All heights and colours are in units of T, see `scales`.
"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import BoundaryNorm, FuncNorm, ListedColormap, Normalize
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from lsweep.pictures.cells import Cells, as_plane, drawn_values, pooled_scale
from lsweep.pictures.marks import (
    SMALL,
    Height,
    default_name,
    describe,
    equal_aspect,
    label_axes,
    mark_points,
    put_legend,
    put_title,
    trace,
)
from lsweep.surfaces.scales import FloatArray, Scale, number
from lsweep.surfaces.surface import Status, Surface

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

COLORS = "viridis"
"""Perceptually uniform, readable in grey and under every kind of colour blindness."""

NONFINITE, FAILED = "#B0B0B0", "#6E6E6E"
_ABOVE, _BELOW = "////", "\\\\\\\\"
_HATCH: dict[str, Any] = {"linewidth": 0.0, "edgecolor": "#303030"}


def _paint(ax: Axes, cells: Cells, scale: Scale, norm: Normalize) -> None:
    """Paint cells: finite ones by value, grey ones, and the hatching of those off the scale."""
    data = np.ma.masked_invalid(cells.t)
    options: dict[str, Any] = {"rasterized": True, "zorder": 0.6}
    if not data.mask.all():
        ax.pcolormesh(cells.x_edges, cells.y_edges, data, cmap=COLORS, norm=norm, **options)
    for mask, color in ((cells.bad & ~cells.failed, NONFINITE), (cells.failed, FAILED)):
        if mask.any():
            one = np.ma.masked_where(~mask, np.ones(mask.shape))
            grey = ListedColormap([color])
            ax.pcolormesh(cells.x_edges, cells.y_edges, one, cmap=grey, **options)
    low, high = scale.limits
    for mask, hatch in ((data > high, _ABOVE), (data < low, _BELOW)):
        corners = cells.rectangles(np.ma.filled(mask, False))
        if len(corners):
            ax.add_collection(
                PolyCollection(list(corners), facecolor="none", hatch=hatch, zorder=2, **_HATCH)
            )


def heat(
    surface: Surface,
    name: str | None,
    ax: Axes,
    *,
    scale: Scale | None = None,
    bar: bool = True,
) -> Axes:
    """Draw every point as the cell that it owns, in the colour of its value.

    Args:
        surface: two axes (of three: the middle of z); ``values[j, i]`` is the cell at x[i], y[j].
        name: the variable; None for the default.
        ax: where; it is also returned.
        scale: range and transform; None for what `pooled_scale` finds, linear up to two
            decades.
        bar: add a colour bar.

    >>> from matplotlib.figure import Figure
    >>> s = Surface({"x": np.arange(3.0), "y": np.arange(2.0)}, {"a": np.arange(6.0).reshape(2, 3)})
    >>> ax = heat(s, "a", Figure().add_subplot())
    >>> ax.get_xlim(), ax.get_ylim()
    ((np.float64(-0.5), np.float64(2.5)), (np.float64(-0.5), np.float64(1.5)))
    """
    surface, name, scale = given(surface, name, scale)
    cells = Cells.of(surface, name, scale)
    _paint(ax, cells, scale, shades(scale))
    ax.set_xlim(cells.x_edges[0], cells.x_edges[-1])
    ax.set_ylim(cells.y_edges[0], cells.y_edges[-1])
    return finish(surface, name, ax, scale, cells, bar, "heat")


def filled(
    surface: Surface,
    name: str | None,
    ax: Axes,
    *,
    scale: Scale | None = None,
    bar: bool = True,
) -> Axes:
    """Draw filled contours between the scale's levels; arguments as in `heat`.

    >>> from matplotlib.figure import Figure
    >>> s = Surface({"x": np.arange(3.0), "y": np.arange(2.0)}, {"a": np.arange(6.0).reshape(2, 3)})
    >>> filled(s, "a", Figure().add_subplot()).get_xlim()
    (np.float64(0.0), np.float64(2.0))
    """
    surface, name, scale = given(surface, name, scale)
    if min(surface.shape) < 2:
        return heat(surface, name, ax, scale=scale, bar=bar)
    cells = Cells.of(surface, name, scale)
    norm = _bands(scale)
    _paint(ax, cells.quarters(surface), scale, norm)
    if cells.squares().any():
        at = scale.drawn_levels()
        options: dict[str, Any] = {"levels": at, "norm": norm, "cmap": COLORS, "zorder": 1}
        data = np.ma.masked_invalid(cells.t)
        with np.errstate(over="ignore"):  # matplotlib's level beyond the last, 1e250, over a range
            drawn = ax.contourf(
                surface.x, surface.y, data, extend=scale.extend, corner_mask=False, **options
            )
        drawn.set_edgecolor("face")  # or a viewer shows the page between two bands
        drawn.set_linewidth(0.3)
        _hatch(surface, ax, data, scale)
    return _frame(surface, name, ax, scale, cells, bar, "filled")


def contour(
    surface: Surface,
    name: str | None,
    ax: Axes,
    *,
    scale: Scale | None = None,
    bar: bool = True,
) -> Axes:
    """Draw labelled contour lines at the scale's levels; arguments as in `heat`.

    >>> from matplotlib.figure import Figure
    >>> s = Surface({"x": np.arange(3.0), "y": np.arange(2.0)}, {"a": np.arange(6.0).reshape(2, 3)})
    >>> contour(s, "a", Figure().add_subplot(), bar=False).get_ylim()
    (np.float64(0.0), np.float64(1.0))
    """
    surface, name, scale = given(surface, name, scale)
    if min(surface.shape) < 2:
        return heat(surface, name, ax, scale=scale, bar=bar)
    cells = Cells.of(surface, name, scale)
    norm = shades(scale)
    _paint(ax, cells.quarters(surface, alone=True), scale, norm)
    data = np.ma.masked_invalid(cells.t)
    if cells.squares().any():
        level = scale.drawn_levels()
        level = level[(level > data.min()) & (level < data.max())]
        if len(level):
            options: dict[str, Any] = {"norm": norm, "cmap": COLORS, "zorder": 1}
            lines = ax.contour(
                surface.x, surface.y, data, level, corner_mask=False, linewidths=1.3, **options
            )
            _label_contours(ax, lines, level, scale)
        _hatch(surface, ax, data, scale)
    return _frame(surface, name, ax, scale, cells, bar, "contour")


def _label_contours(ax: Axes, lines: Any, level: FloatArray, scale: Scale) -> None:
    """Label every second level at its roomiest place; one without room is told by its colour."""
    words = [number(float(v)) for v in scale.transform.inverse(level)]
    page = np.array(ax.bbox.size) * 72 / ax.figure.dpi  # in points
    start = np.array([ax.get_xlim()[0], ax.get_ylim()[0]])
    span = np.array([np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())])
    paths = [p.vertices for p in lines.get_paths()]
    places = [(p - start) / span * page.min() for p in paths]
    taken: list[tuple[FloatArray, float]] = []
    for k in reversed(range(len(level) - 1, -1, -2)):
        half = 0.3 * (SMALL - 0.5) * len(words[k])
        at = places[k]
        others = np.concatenate([np.empty((0, 2)), *(p for i, p in enumerate(places) if i != k)])
        room = np.min([at, page.min() - at], axis=(0, 2)) - half
        for other, length in taken:
            room = np.minimum(room, np.hypot(*(at - other).T) - half - length)
        gap = _nearest(at, others)
        room = np.where((room > 3.0) & (gap > 0.8 * SMALL), np.minimum(room, 6 * gap), 0.0)
        if not len(room) or not room.max() > 0:
            continue
        best = int(np.argmax(room))
        taken.append((at[best], half))
        for text in lines.clabel(
            [lines.levels[k]], fmt={lines.levels[k]: words[k]}, fontsize=SMALL - 0.5,
            colors="black", inline=False, manual=[tuple(paths[k][best])],
        ):  # fmt: skip
            text.set_path_effects([withStroke(linewidth=2.0, foreground="white")])


def _nearest(at: FloatArray, others: FloatArray) -> FloatArray:
    """Return the distance of each of (n, 2) places to the nearest of (m, 2) others."""
    far = np.full(len(at), np.inf)
    for part in np.array_split(others, len(others) // 256 + 1):
        if len(part):
            far = np.minimum(far, np.hypot(*(at[:, None] - part).T).min(0))
    return far


def _hatch(surface: Surface, ax: Axes, data: Any, scale: Scale) -> None:
    """Hatch the squares' areas outside the scale, exactly along its outermost levels."""
    low, high = scale.limits
    for (a, b), hatch in (((high, data.max()), _ABOVE), ((data.min(), low), _BELOW)):
        if a < b:
            margin = 1.0 + abs(b - a)
            levels = [a, b + margin] if hatch == _ABOVE else [a - margin, b]
            area = ax.contourf(
                surface.x, surface.y, data, levels, colors="none", hatches=[hatch],
                corner_mask=False, zorder=2,
            )  # fmt: skip
            area.set(**_HATCH)


def add_bar(axes: Sequence[Axes], scale: Scale, text: str, kind: str) -> None:
    """Add one colour bar for all axes, in units of the metric, with bands where the map has them.

    It stands beside the last of one row and is as high as that is; beside several rows it
    belongs to the figure.

    >>> from matplotlib.figure import Figure
    >>> ax = Figure().add_subplot()
    >>> add_bar([ax], Scale(0.0, 1.0, 0.0, 2.0), "loss", "filled")
    >>> ax.child_axes[0].get_ylabel()
    'loss'
    """
    last = axes[-1]
    norm = _bands(scale) if kind == "filled" else shades(scale)
    grid = last.get_subplotspec()
    place: dict[str, Any]
    if len(axes) > 1 and grid is not None and grid.get_gridspec().nrows > 1:
        place = {"ax": list(axes), "shrink": 0.5, "aspect": 30, "pad": 0.02}
    else:
        box = (1.12, 0.2, 0.035, 0.55) if kind == "3d" else (1.04, 0.0, 0.045, 1.0)
        place = {"cax": last.inset_axes(box)}
    bar = last.figure.colorbar(
        ScalarMappable(norm, COLORS),
        extend=scale.extend,
        **place,
        spacing="uniform" if scale.cuts else "proportional",
    )
    tick, written = scale.ticks()
    bar.set_ticks(list(scale.transform.forward(tick)), labels=written)
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL + 1)
    text += {"ln": ", log scale", "asinh": ", asinh scale"}.get(scale.transform.name, "")
    text += ", uneven levels" if scale.cuts else ""
    flat = 1.0
    if kind != "3d":
        last.apply_aspect()  # a long plane has a short bar
        frame = last.get_window_extent()
        flat = min(1.0, frame.height / frame.width)
    bar.ax.set_ylabel(textwrap.fill(text, max(12, int(44 * flat))), parse_math=False)


def shades(scale: Scale) -> Normalize:
    """Return what makes a place on the colour map of T: as much of it from level to level."""
    if not scale.cuts:
        return Normalize(*scale.limits)
    low, high = scale.limits
    at = np.array([2 * low - high, *scale.cuts, 2 * high - low])
    place = np.array([-1.0, *np.linspace(0.0, 1.0, len(scale.cuts)), 2.0])
    both = partial(np.interp, xp=at, fp=place), partial(np.interp, xp=place, fp=at)
    return FuncNorm(both, low, high)


def _bands(scale: Scale) -> BoundaryNorm:
    levels = scale.drawn_levels()
    return BoundaryNorm(levels, matplotlib.colormaps[COLORS].N, extend=scale.extend)


def given(
    surface: Surface, name: str | None, scale: Scale | None, *, whole: bool = False
) -> tuple[Surface, str, Scale]:
    """Return the plane, with pending values blanked, the variable's name and the scale."""
    plane = as_plane(surface)
    name = default_name(plane) if name is None else name
    plane = replace(plane, values={**plane.values, name: drawn_values(plane, name)})
    return plane, name, scale or pooled_scale([plane], name, whole=whole)


def _frame(
    surface: Surface, name: str, ax: Axes, scale: Scale, cells: Cells, bar: bool, kind: str
) -> Axes:
    ax.set_xlim(surface.x[0], surface.x[-1])
    ax.set_ylim(surface.y[0], surface.y[-1])
    return finish(surface, name, ax, scale, cells, bar, kind)


def finish(
    surface: Surface,
    name: str,
    ax: Axes,
    scale: Scale,
    cells: Cells,
    bar: bool,
    kind: str = "3d",
    height: Height | None = None,
) -> Axes:
    """Add what every map has: aspect, axis labels, marks, legend, title, colour bar."""
    if height is None:
        equal_aspect(surface, ax)
        ax.tick_params(labelsize=SMALL + 1)
        ax.locator_params(nbins=5)
    label_axes(surface, ax)
    entries = mark_points(surface, name, ax, height) + trace(surface, ax, height)
    grid = ax.get_subplotspec()
    letters = 44 if grid is not None and grid.get_gridspec().ncols > 1 else 60
    waits = bool((surface.status == Status.PENDING).any())
    entries += _outcomes(cells, scale, kind, "pending" if waits else "not evaluated")
    put_legend(ax, entries, letters=letters, below=24 if height else 32)
    put_title(ax, surface.title)
    if bar:
        add_bar([ax], scale, describe(surface, name), kind)
    return ax


def _outcomes(cells: Cells, scale: Scale, kind: str, blank: str) -> list[Artist]:
    """Return legend entries for what is not simply a value on the scale, with its count."""
    entries: list[Artist] = []
    low, high = scale.limits
    t = cells.t[np.isfinite(cells.t)]
    value = scale.transform.inverse
    top = {"facecolor": matplotlib.colormaps[COLORS](1.0)} if kind != "contour" else {}
    base = {"facecolor": matplotlib.colormaps[COLORS](0.0)} if kind != "contour" else {}
    plain: dict[str, Any] = {"edgecolor": "#303030", "linewidth": 0.5}
    if (t > high).any():
        text = f"above {number(scale.high)}, up to {number(float(value(t.max())))}"
        hatch = "++++" if kind == "3d" else _ABOVE
        entries.append(Patch(**{"facecolor": "none", **plain, **top}, hatch=hatch, label=text))
    if (t < low).any():
        text = f"below {number(scale.low)}"
        entries.append(Patch(**{"facecolor": "none", **plain, **base}, hatch=_BELOW, label=text))
    for mask, color, text in (
        (cells.bad & ~cells.failed, NONFINITE, "not finite"),
        (cells.failed, FAILED, "failed"),
        (cells.pending, "white", blank),
    ):
        if mask.any():
            count = f"{text} ({int(mask.sum())} of {mask.size})"
            entries.append(Patch(facecolor=color, label=count, **plain))
    return entries

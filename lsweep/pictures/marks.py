"""Marks: what is laid over a picture - axes, minimum, centre, trajectory - and its legend.

A function that draws returns the legend entries of what it drew. ``height`` is None on a plane;
on a relief it gives the height at (x, y), (n,), (n,) -> (n,), and everything is drawn at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import ScaledTranslation

from lsweep.errors import LsweepError
from lsweep.measures.from_surface import guessed
from lsweep.surfaces.scales import FloatArray, number
from lsweep.surfaces.surface import Surface, Trajectory
from lsweep.wording import counted

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Height = Callable[[FloatArray, FloatArray], FloatArray]

# Okabe and Ito's colours, those that carry a line on white: distinct under colour blindness.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
LINE_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")

SMALL = 7.0
Z = 1.96  # standard errors on either side that a band or a bar shows
"""Font size in points of legends, captions and contour labels."""

_SLIVER = 8.0  # above this ratio of lengths a picture with equal aspect cannot be read


def default_name(surface: Surface) -> str:
    """Return the variable that is drawn when none is named: ``train_loss`` or the first metric.

    Raises:
        LsweepError: the surface holds no metric.

    >>> default_name(Surface({"x": np.zeros(1)}, {"b_se": np.zeros(1), "b": np.zeros(1)}))
    'b'
    """
    if "train_loss" in surface.values:
        return "train_loss"
    extra = ("_se", "_error", "weight_sq")
    names = [n for n in surface.metrics if not n.endswith(extra)] or list(surface.metrics)
    if not names:
        raise LsweepError("this surface holds no metric: nothing to draw")
    return names[0]


def describe(surface: Surface, name: str) -> str:
    """Return how an axis or a colour bar names a variable, with its unit if it has one.

    >>> describe(Surface({"x": np.zeros(1)}, {"train_loss": np.zeros(1)}), "train_loss")
    'train loss'
    """
    attributes = surface.attributes.get(name, {})
    text = attributes.get("long_name") or name.replace("_", " ")
    units = attributes.get("units", "1")
    return text if units in ("1", "") else f"{text} ({units})"


def label_axes(surface: Surface, ax: Axes) -> None:
    """Write the directions along the axes, ``x (random, filter)``; in 3-D there is room for x."""
    for axis in ("x", "y")[: len(surface.axes)]:
        direction = surface.attributes.get(axis, {}).get("direction")
        text = f"{axis} ({direction})" if direction and ax.name != "3d" else axis
        getattr(ax, f"set_{axis}label")(text, parse_math=False)


def norms(surface: Surface) -> tuple[float, float] | None:
    """Return the lengths in weight space of one unit of x and of y, or None where not recorded.

    >>> axes, at = {"x": np.zeros(1), "y": np.zeros(1)}, {"x": {"norm": "2"}, "y": {"norm": "3"}}
    >>> norms(Surface(axes, {"a": np.zeros((1, 1))}, attributes=at))
    (2.0, 3.0)
    """
    try:
        x, y = (float(surface.attributes.get(a, {}).get("norm", "nan")) for a in "xy")
    except ValueError:
        return None
    return (x, y) if 0 < x < math.inf and 0 < y < math.inf else None


def lengths(surface: Surface) -> tuple[float, float] | None:
    """Return the relative lengths that the x and y sides have on the page, or None: free.

    With the directions' norms known, equal distance in weight space is equal length; without
    them axes of the same range are taken to have one unit. A plane more than eight times as long
    as wide is left free, for nothing could be read in it.
    """
    spans = [float(np.ptp(surface.axes[a])) for a in "xy"]
    norm = norms(surface) or ((1.0, 1.0) if math.isclose(*spans) else None)
    if norm is None or not all(spans):
        return None
    x, y = spans[0] * norm[0], spans[1] * norm[1]
    return (x, y) if max(x, y) <= _SLIVER * min(x, y) else None


def equal_aspect(surface: Surface, ax: Axes) -> None:
    """Make one unit of x as long on the page as the directions' norms say, see `lengths`."""
    sides = lengths(surface)
    if sides is None:
        ax.set_aspect("auto")
    else:
        unit = [s / float(np.ptp(surface.axes[a])) for s, a in zip(sides, "xy", strict=True)]
        ax.set_aspect(unit[1] / unit[0])


def put_title(ax: Axes, text: str) -> None:
    """Write the title as it is: ``$`` and ``_`` are not mathematics."""
    ax.set_title(text, size="medium", parse_math=False)


def mark_points(
    surface: Surface, name: str, ax: Axes, height: Height | None = None
) -> list[Artist]:
    """Mark the minimum with a star and the centre with a cross; return their legend entries.

    Of an accuracy the star is the maximum; of an error neither is of interest.
    """
    entries: list[Artist] = []
    if name.endswith(("_error", "_se")):
        return entries
    x, y, constant = surface.x, surface.y, surface.constant(name)
    if x.min() <= 0 <= x.max() and y.min() <= 0 <= y.max():
        value = surface.center(name)
        lifted = float(surface.attributes.get("z", {}).get("at", "0")) != 0.0
        text = "x = y = 0:" if lifted else "centre"
        text += f" {number(value)}" if math.isfinite(value) else ""
        text += ", constant" if constant else ""
        halo = [withStroke(linewidth=3.2, foreground="white")]
        style: dict[str, Any] = {"marker": "+", "ms": 13, "mec": "black", "path_effects": halo}
        style["mew"] = 1.3
        entries += _marker(ax, 0.0, 0.0, height, label=text, **style)
    if np.isfinite(surface[name]).any() and not (constant and entries):
        word, where, value = surface.best(name)
        at = f"({number(where['x'])}, {number(where['y'])})"
        style = {"marker": "*", "ms": 8.5, "mfc": "white", "mec": "black"}
        guess = guessed(surface, name, where)
        text = f"{word} {number(value)} at {at}" + (f" ({guess})" if guess else "")
        entries += _marker(ax, where["x"], where["y"], height, label=text, **style)
    return entries


def dot_evaluated(surface: Surface, ax: Axes) -> str:
    """Put a dot at every evaluated point of a plane, or a tick under a line; return what they are.

    >>> from matplotlib.figure import Figure
    >>> line = Surface({"x": np.zeros(2)}, {"a": np.zeros(2)}, np.array([1, 4], np.uint8))
    >>> dot_evaluated(line, Figure().add_subplot())
    'Ticks: the 1 evaluated points.'
    """
    where = np.nonzero(surface.evaluated)
    count = f"the {len(where[0])} evaluated points."
    style: dict[str, Any] = {"ls": "none", "color": "black", "zorder": 4}
    if len(surface.axes) == 1:
        style |= {"marker": 2, "ms": 4, "mew": 0.6, "clip_on": False}
        bottom = np.zeros(len(where[0]))
        ax.plot(surface.x[where[0]], bottom, transform=ax.get_xaxis_transform(), label="_", **style)
        return f"Ticks: {count}"
    size = float(np.clip(30.0 / math.sqrt(max(1, len(where[0]))), 0.5, 2.8))
    style |= {"marker": "o", "ms": size, "mew": 0.25, "mec": "white", "clip_on": False}
    ax.plot(surface.x[where[1]], surface.y[where[0]], label="_", **style)
    return f"Dots: {count}"


def _marker(
    ax: Axes, x: float, y: float, height: Height | None, *, label: str, **style: Any
) -> list[Artist]:
    at = _lift(np.array([x]), np.array([y]), height)
    if not np.isfinite(at).all():
        return []
    options = {"ls": "none", "mew": 0.8, "zorder": 8, **style}
    return list(ax.plot(*at, label=label, clip_on=height is not None, **options))


def _lift(x: FloatArray, y: FloatArray, height: Height | None) -> tuple[FloatArray, ...]:
    return (x, y) if height is None else (x, y, height(x, y))


def trace(surface: Surface, ax: Axes, height: Height | None = None) -> list[Artist]:
    """Draw the checkpoints of the trajectory on the plane, see `join`."""
    t = surface.trajectory
    if t is None:
        return []
    at = _lift(t.offsets[:, 0], t.offsets[:, 1], height)
    inside = np.ones(len(t.offsets), bool)
    for axis, column in zip((surface.x, surface.y), t.offsets.T, strict=False):
        rounding = 1e-6 * float(np.ptp(axis))
        inside &= (column >= axis.min() - rounding) & (column <= axis.max() + rounding)
    outside = int(np.count_nonzero(np.isfinite(t.offsets).all(1) & ~inside))
    entries = join(t, at, ax, path=is_path(surface), clip=outside > 0)
    if entries and outside:
        many = counted(outside, "step" if is_path(surface) else "checkpoint")
        entries.append(Line2D([], [], ls="none", label=f"{many} outside the picture"))
    return entries


def is_path(surface: Surface) -> bool:
    """Whether the checkpoints on a surface follow each other, and are not just the axes' ends."""
    plan = surface.provenance.get("plan", {})
    kinds = {recipe.get("kind") for recipe in plan.get("directions", {}).values()}
    return bool(plan.get("facts", {}).get("track")) or not kinds & {"to", "plane"}


def palette_of(count: int) -> list[str]:
    """Return a colour for each of several lines: few are distinct, many are a scale.

    >>> len(set(palette_of(7))), len(set(palette_of(40)))
    (7, 40)
    """
    if count <= len(LINE_COLORS):
        return list(LINE_COLORS[:count])
    scale = matplotlib.colormaps["turbo"]
    return [to_hex(scale(t)) for t in np.linspace(0.03, 0.97, count)]


def join(
    t: Trajectory, at: Sequence[FloatArray], ax: Axes, *, path: bool = True, clip: bool = True
) -> list[Artist]:
    """Mark checkpoints; a path is joined by a line.

    The marker's area grows with residual / in-plane distance. A step that lies farther from the
    plane than along it says little on the plane: it is hollow.

    Args:
        t: (T,) steps.
        at: two or three arrays (T,), where they are drawn.
        ax: the picture.
        path: whether they follow each other.
        clip: whether some lie outside; else those on the border are drawn whole.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(t.residual > 0, t.residual / t.in_plane, 0.0)
    good = np.asarray(np.isfinite(np.stack(list(at))).all(axis=0))
    if not good.any():
        return []
    halo = [withStroke(linewidth=2.2, foreground="white")]
    at = [a[good] for a in at]
    hollow = ~(ratio[good] <= 1.0)
    area = 12.0 + 40.0 * np.clip(np.nan_to_num(ratio[good], nan=1.0, posinf=1.0), 0.0, 1.0)
    if path:
        ax.plot(*at, color=VERMILLION, lw=1.1, zorder=5, path_effects=halo)
    style: dict[str, Any] = {"edgecolors": VERMILLION, "linewidths": 1.1, "zorder": 6}
    style |= {"clip_on": clip}
    if (~hollow).any():
        _scatter(ax, at, ~hollow, area, {**style, "facecolors": VERMILLION, "edgecolors": "white"})
    if hollow.any():
        _scatter(ax, at, hollow, area, {**style, "facecolors": "white"})
    labels = [t.labels[i] for i in np.flatnonzero(good) if i < len(t.labels)]
    if len(t.labels) == len(t.offsets) == 1:  # the end of a line is no trajectory
        end: dict[str, Any] = {"color": VERMILLION, "mec": "white", "ls": "none", "ms": 4.5}
        return [Line2D([], [], marker="o", label=labels[0], **end)]
    if len(at) == 2:
        ends = range(len(labels)) if not path else sorted({0, len(labels) - 1}) if labels else []
        for i in ends:
            right = at[0][i] > np.mean(ax.get_xlim())
            above = at[1][i] > np.mean(ax.get_ylim())  # over the border stands the title
            ax.annotate(
                labels[i],
                (float(at[0][i]), float(at[1][i])),
                xytext=(-5 if right else 5, -5 if above else 5),
                ha="right" if right else "left",
                va="top" if above else "bottom",
                textcoords="offset points",
                size=SMALL,
                zorder=9,
                path_effects=halo,
                parse_math=False,
                annotation_clip=True,
            )
    entry: dict[str, Any] = {"color": VERMILLION, "marker": "o", "lw": 1.1, "ms": 4.5}
    text = "trajectory" if path else "checkpoints"
    text += " (marker area: residual / in-plane)"
    entry |= {} if path else {"ls": "none"}
    entries: list[Artist] = [Line2D([], [], mec="white", label=text, **entry)]
    if hollow.any():
        text = "hollow: farther from the plane than along it"
        entries.append(Line2D([], [], mfc="white", label=text, **{**entry, "ls": "none", "ms": 6}))
    return entries


def _scatter(
    ax: Axes, at: Sequence[FloatArray], chosen: Any, area: FloatArray, style: dict[str, Any]
) -> None:
    points = [a[chosen] for a in at]
    if len(points) == 3:
        style = {**style, "depthshade": False}
        ax.scatter(*points, s=area[chosen], **style)  # type: ignore[misc]
    else:
        ax.scatter(points[0], points[1], s=area[chosen], **style)


def put_legend(
    ax: Axes, entries: Sequence[Artist], *, letters: int = 56, below: float = 32
) -> None:
    """Put the legend under the axes, ``below`` points from their edge, where it covers no data.

    Args:
        ax: the picture.
        entries: artists with labels; none make no legend.
        letters: about how many stand side by side before the legend is wider than the axes.
        below: points between the axes and the legend, for ticks and the axis label.
    """
    if not entries:
        return
    size = [len(str(e.get_label())) + 5 for e in entries]
    split = {n: np.array_split(size, n) for n in range(1, min(3, len(size)) + 1)}
    fits = [n for n, parts in split.items() if sum(int(p.max()) for p in parts) <= letters]
    columns = max(fits, default=1)
    legend = ax.legend(
        handles=list(entries),
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        bbox_transform=ax.transAxes + ScaledTranslation(0, -below / 72, ax.figure.dpi_scale_trans),
        borderaxespad=0.0,
        fontsize=SMALL,
        frameon=False,
        ncols=columns,
        handlelength=1.8,
        markerscale=0.7,
        columnspacing=1.2,
        labelspacing=0.35,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)

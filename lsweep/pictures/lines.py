"""Lines: pictures of a line through weight space - loss, accuracy on a twin axis, bands, runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from lsweep.errors import LsweepError
from lsweep.measures.from_surface import guessed
from lsweep.pictures.cells import drawn_values, edges, in_per_cent
from lsweep.pictures.marks import (
    BLUE,
    SMALL,
    VERMILLION,
    Z,
    default_name,
    describe,
    is_path,
    join,
    label_axes,
    put_legend,
    put_title,
)
from lsweep.surfaces.scales import FloatArray, Scale, number, round_ticks
from lsweep.surfaces.surface import Status, Surface

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_TWIN = "lsweep accuracy"
_STYLE = "#505050"  # of lines in the legend that explain a style, whatever the run
_LOSSES, _ACCURACIES = (BLUE, "#56B4E9"), (VERMILLION, "#E69F00")  # of splits in turn: their bands
_GREY, _BAD = "#DDDDDD", "not finite or failed"


def _family(surface: Surface, name: str | None) -> list[tuple[str, str | None]]:
    """Return (loss, its accuracy or None) per split, the split ``train`` first."""
    first = default_name(surface) if name is None else name
    surface[first]  # raises if there is none
    if not first.endswith("_loss"):
        return [(first, None)]
    losses = [first]
    if name is None:
        found = [n for n in surface.metrics if n.endswith("_loss")]
        losses = sorted(found, key=lambda n: (not n.startswith("train"), found.index(n)))
    accuracies = (n.removesuffix("_loss") + "_accuracy" for n in losses)
    return [
        (n, a if a in surface.values else None) for n, a in zip(losses, accuracies, strict=True)
    ]


def line_scale(
    surfaces: Sequence[Surface],
    name: str | None = None,
    *,
    log: bool | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
) -> Scale:
    """Return one `Scale` for the left axis of lines: from the least to the greatest loss shown.

    >>> s = Surface({"x": np.arange(2.0)}, {"a": np.array([1.0, 2.0])})
    >>> line_scale([s]).high
    2.0
    """
    shown = [(s, loss) for s in surfaces for loss, _ in _family(s, name)]
    centers = [c for c in (s.center(n) for s, n in shown) if np.isfinite(c)]
    center = min(centers, default=float("nan"))
    if log is None:  # decided by what is drawn: bands would reach far above and below
        plain = [drawn_values(s, n) for s, n in shown if not in_per_cent(s, n)]
        found = Scale.of(plain, log=None, center=center, vmin=vmin, vmax=vmax, quantile=1.0)
        log = bool(plain) and found.transform.name != "linear"
    values = [part for s, n in shown for part in _with_band(s, n, log)]
    return Scale.of(values, log=log, center=center, vmin=vmin, vmax=vmax, quantile=1.0)


def _with_band(surface: Surface, name: str, log: bool) -> list[FloatArray]:
    """Return the values and, where it leaves no more than as much room to them, their band."""
    value = drawn_values(surface, name)
    found, _ = _half_width(surface, name)
    known = value[np.isfinite(value)]
    if found is None or not len(known):
        return [value]
    low, high = float(known.min()), float(known.max())  # Python's floats overflow without a word
    if not high - low < 1e300:
        return [value]
    span = (high - low) or math.inf
    most = np.clip(value + found, None, high + span)
    return [value, most] if log else [value, most, np.clip(value - found, low - span, None)]


def _half_width(surface: Surface, name: str) -> tuple[FloatArray | None, str]:
    """Return 1.96 standard errors of a variable, and which; None where they are not known.

    Between evaluated points the line is interpolated, and its band with it.
    """
    for suffix, against in (("_diff_se", " vs centre"), ("_se", "")):
        if f"{name}{suffix}" in surface.values:
            width = Z * np.clip(surface[f"{name}{suffix}"], 0.0, 1e300)
            known, between = np.isfinite(width), surface.status == Status.INTERPOLATED
            if known.any() and between.any():
                through = np.interp(surface.x, surface.x[known], width[known])
                width, against = np.where(between, through, width), f"{against}, interpolated too"
            return width, against
    return None, ""


def line(
    surface: Surface,
    name: str | None,
    ax: Axes,
    *,
    scale: Scale | None = None,
    color: str | None = None,
    label: str | None = None,
) -> Axes:
    """Draw a surface with one axis: loss on the left, accuracy of the same split on the right.

    The first split is drawn solid, the second dashed. Bands are 1.96 standard errors of the
    difference to the centre where that is known, else of the value; where it is NaN there is none.

    Args:
        surface: one axis, values (nx,).
        name: a loss, drawn with its accuracy; any other variable, drawn alone; None for all
            losses and their accuracies.
        ax: where; it is also returned. Called again, it draws a further run into the same axes.
        scale: range and transform of the left axis; None for linear and all values.
        color: of all lines of this run; None for blues (loss) and oranges (accuracy), a hue for
            each split.
        label: of this run, when several share the axes.

    Raises:
        LsweepError: the surface has more than one axis.

    >>> from matplotlib.figure import Figure
    >>> s = Surface({"x": np.arange(2.0)}, {"a": np.array([1.0, 2.0])})
    >>> line(s, "a", Figure().add_subplot()).get_ylabel()
    'a'
    """
    if len(surface.axes) != 1:
        raise LsweepError("kind = 'line' needs a surface with one axis; of a plane: 'filled'")
    family = _family(surface, name)
    scale = line_scale([surface], name) if scale is None else scale
    _left_axis(ax, scale, _axis_text(surface, [n for n, _ in family]), color)
    accuracies = [a for _, a in family if a is not None]
    twin = _twin(ax, create=bool(accuracies))
    several = label is not None
    for i, (loss, accuracy) in enumerate(family):
        dash = _DASHES[i % len(_DASHES)]
        for variable, axes in ((loss, ax), (accuracy, twin)):
            if variable is None or axes is None:
                continue
            thick = axes is ax or not several
            style: dict[str, Any] = {"ls": dash, "lw": 1.6 if thick else 0.9}
            style["color"] = color or (_LOSSES if axes is ax else _ACCURACIES)[i % 2]
            text = describe(surface, variable)
            if several:
                first = i == 0 and axes is ax
                if len(family) > 1 or accuracies:
                    _explain(ax, text, **{**style, "color": _STYLE})
                text = str(label) if first else "_"
            _plot(surface, variable, axes, text, style)
    _mark(surface, family[0][0], ax, color or BLUE, several)
    if accuracies and twin is not None:
        _right_axis(surface, accuracies, twin, color)
    label_axes(surface, ax)
    ax.tick_params(labelsize=SMALL + 1)
    ax.margins(x=0.02)
    if not several:
        put_title(ax, surface.title)
    _put_legend(ax, twin)
    return ax


def _axis_text(surface: Surface, names: Sequence[str]) -> str:
    """Return what the axis shows: the variable's name, or only its metric if splits share it."""
    if len(names) == 1:
        return describe(surface, names[0])
    return describe(surface, names[0]).removeprefix(names[0].split("_")[0] + " ")


def _left_axis(ax: Axes, scale: Scale, text: str, color: str | None) -> None:
    transform = scale.transform
    if transform.name == "ln":
        ax.set_yscale("log", nonpositive="clip")
    elif transform.name == "asinh":
        ax.set_yscale("function", functions=(transform.forward, transform.inverse))
    low, high = scale.limits
    margin = 0.06 * (high - low)
    ends = (scale.low, scale.high)
    if not scale.below:
        ends = (float(transform.inverse(low - margin)), ends[1])
    if not scale.above:
        ends = (ends[0], float(transform.inverse(high + margin)))
    ax.set_ylim(*ends)
    tick, written = round_ticks(*ends, transform)
    ax.yaxis.set_major_locator(FixedLocator(list(tick)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_yticks(tick, written)
    text += {"ln": ", log scale", "asinh": ", asinh scale"}.get(transform.name, "")
    ax.set_ylabel(textwrap.fill(text, 40), color="black" if color else BLUE, parse_math=False)


def _right_axis(surface: Surface, names: Sequence[str], twin: Axes, color: str | None) -> None:
    twin.set_ylabel(
        _axis_text(surface, names), color="black" if color else VERMILLION, parse_math=False
    )
    twin.tick_params(labelsize=SMALL + 1)
    shown = np.concatenate([drawn_values(surface, n) for n in names])
    shown = shown[np.isfinite(shown)]
    if len(shown) and shown.min() >= 0 and 1 < shown.max() <= 100:  # percent; a share has max <= 1
        twin.set_ylim(-3, 103)


def _twin(ax: Axes, *, create: bool) -> Axes | None:
    """Return the right-hand axes that an earlier run has made, or make them."""
    for other in ax.figure.axes:
        if other.get_label() == _TWIN and ax.get_shared_x_axes().joined(ax, other):
            return other
    if not create:
        return None
    twin = ax.twinx()
    twin.set_label(_TWIN)
    return twin


def _plot(surface: Surface, name: str, ax: Axes, text: str, style: dict[str, Any]) -> None:
    x, value = surface.x, drawn_values(surface, name)
    value = np.clip(np.where(np.isfinite(value), value, np.nan), -1e300, 1e300)
    good = np.isfinite(value)
    ax.plot(x, value, label=text, zorder=3, **style)
    padded = np.concatenate([[False], good, [False]])
    alone = good & ~padded[:-2] & ~padded[2:]
    if alone.any():  # a line needs two neighbours: early pictures have few
        ax.plot(x[alone], value[alone], ls="none", marker="o", ms=3.5, color=style["color"])
    width, against = _half_width(surface, name)
    if width is None:
        return
    where = good & np.isfinite(width)
    if where.any():
        width = np.where(where, width, 0.0)
        low, high = (np.clip(value + s * width, -1e300, 1e300) for s in (-1, 1))
        if ax.get_yscale() == "log":
            low = np.maximum(low, min(float(ax.get_ylim()[0]), float(value[where].min())) / 10)
        ax.fill_between(
            x, low, high, where=where.tolist(), color=style["color"], alpha=0.2, lw=0, zorder=1,
            label=f"±{Z} s.e.{against}",
        )  # fmt: skip


def _mark(surface: Surface, name: str, ax: Axes, color: str, several: bool) -> None:
    """Mark the centre, the best point, the trajectory, and the points that have no value."""
    x, value = surface.x, drawn_values(surface, name)
    labels = {t.get_label() for t in ax.get_lines()}
    if x.min() <= 0 <= x.max() and "centre" not in labels:
        ax.axvline(0.0, color="#808080", lw=0.8, ls=(0, (1, 2)), zorder=0, label="centre")
    finite = np.isfinite(value)
    if finite.any():
        shown = replace(surface, values={**surface.values, name: value})
        word, where, best = shown.best(name)
        guess = guessed(surface, name, where)
        text = f"{word} {number(best)} at {number(where['x'])}" + (f" ({guess})" if guess else "")
        text = f"constant {number(best)}" if shown.constant(name) else text
        text = word if several else text
        star: dict[str, Any] = {"marker": "*", "ms": 10, "mfc": color, "mec": "white", "mew": 0.7}
        ax.plot([where["x"]], [best], ls="none", label=text, zorder=6, **star)
    pending = surface.status == Status.PENDING
    bad = ~finite & surface.evaluated
    edge = edges(x)
    for left, right in zip(edge[:-1][bad], edge[1:][bad], strict=True):
        ax.axvspan(left, right, color=_GREY, lw=0, zorder=0, label=_BAD)
    if bad.any():
        ax.plot(
            x[bad], np.zeros(int(bad.sum())), "x", color=color, ms=4,
            transform=ax.get_xaxis_transform(), clip_on=False, zorder=7, label="_",
        )  # fmt: skip
    if pending.any():
        _explain(ax, f"{int(pending.sum())} of {pending.size} points pending", ls="none")
    t = surface.trajectory
    if t is not None and name in t.values and not several:
        for entry in join(t, (t.offsets[:, 0], t.values[name]), ax, path=is_path(surface)):
            assert isinstance(entry, Line2D), "entries of a trajectory are lines"
            ax.add_line(entry)


def _explain(ax: Axes, text: str, **style: Any) -> None:
    """Add a legend entry without data, once."""
    if text not in {str(t.get_label()) for t in ax.get_lines()}:
        ax.plot([], [], label=text, **style)


def _put_legend(ax: Axes, twin: Axes | None) -> None:
    entries: dict[str, Artist] = {}
    for axes in (ax, twin):
        for artist in [] if axes is None else (*axes.get_lines(), *axes.collections, *axes.patches):
            text = str(artist.get_label())
            if not text.startswith("_"):
                entries.setdefault(text, artist)
    for text in [t for t in entries if t.startswith("±")]:  # bands have their lines' colours
        entries[text] = Patch(color=_STYLE, alpha=0.2, lw=0, label=text)
    if _BAD in entries:
        entries[_BAD] = Patch(color=_GREY, label=_BAD)
    put_legend(ax, sorted(entries.values(), key=_rank), letters=92)


def _rank(entry: Artist) -> int:
    """Runs come first in a legend, then what their styles mean, then marks."""
    if str(entry.get_label()).startswith(("centre", "minimum", "maximum", "±", _BAD)):
        return 2
    return int(isinstance(entry, Line2D) and entry.get_color() == _STYLE)

"""The study's figure: each measure against the generalisation gap, and the τ beside its chance.

A panel for each measure, a dot for each network: error bars are the spread over planes and the
standard error of the gap. Colours tell the values of one hyper-parameter, shapes those of another.
Beside them each ψ, Ψ and τ as a mark on its grey null interval.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lsweep.comparison.comparing import PARTS, PROFILES, Comparison
from lsweep.comparison.relate import FEWEST, INSIDE, Relation, Tau
from lsweep.comparison.siblings import GAPS
from lsweep.errors import LsweepError
from lsweep.pictures.marks import LINE_COLORS, SMALL, palette_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 6  # measures that are drawn
KEY = (
    "nonconvex_fraction", "sharpness", "filter_hessian_max", "hessian_max", "input_jacobian",
    "weight_norm", "worst_adaptive_20", "filter_hessian_trace", "hessian_trace",
    "spectral_negative_mass", "basin_area", "relative_flatness", "train_loss",
)  # fmt: skip
"""Families that are drawn first, in this order; others follow in theirs."""
SHAPES = "os^Dv<>p*X"
WIDE = 10.0  # ratio of a measure's largest to its least, above which its axis is logarithmic
NULL = "#C8C8C8"


def chosen(c: Comparison) -> list[str]:
    """Return which measures are drawn: one of each family, its middle member, the key ones first.

    Raises:
        LsweepError: no measure differs between two networks that have a gap.
    """
    names = list(dict.fromkeys(name for n in c.networks for name in n.measures))
    known = [n for n in names if n not in PARTS and _varies(*_points(c, n)[:2])]
    families: dict[str, list[str]] = {}
    for name in known:
        families.setdefault(name.partition("@")[0], []).append(name)
    order = sorted(
        (f for f in families if f not in PROFILES),
        key=lambda f: KEY.index(f) if f in KEY else len(KEY),
    )
    found = [families[f][len(families[f]) // 2] for f in order][:MOST]
    if not found:
        raise LsweepError(
            "a study's figure needs a measure that differs between at least two networks, and "
            "their generalisation gap (splits train and test)"
        )
    return found


def _points(c: Comparison, name: str) -> tuple[Any, Any, int]:
    """Return (measure, gap), each (n,), and how many networks have both."""
    x = c.values(name)
    y = np.array([n.gaps[c.gap][0] if c.gap in n.gaps else math.nan for n in c.networks])
    return x, y, int((np.isfinite(x) & np.isfinite(y)).sum())


def _varies(x: Any, y: Any) -> bool:
    """Whether a measure orders any of the networks that have a gap."""
    known = x[np.isfinite(x) & np.isfinite(y)]
    return len(known) > 1 and bool(np.ptp(known) > 0)


def study_figure(c: Comparison) -> Figure:
    """Return the figure of a comparison.

    Raises:
        LsweepError: there is nothing to draw, as in `chosen`.
    """
    names = chosen(c)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    tested = {n: c.all.relations[n] for n in names if n in c.all.relations}
    beside = 3.2 if tested else 1.7
    size = (2.75 * columns + beside, max(2.5 * rows, 2.9) + 1.25)
    figure = Figure(figsize=size, layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[2.75 * columns, beside])
    left, right = halves
    color, shape, entries = _styles(c)
    for i, name in enumerate(names):
        ax = left.add_subplot(rows, columns, i + 1)
        _scatter(c, name, ax, color, shape)
        if i % columns == 0:
            ax.set_ylabel(GAPS[c.gap].replace(", ", ",\n"), size=SMALL + 1)
    ax = right.add_subplot()
    if tested:
        _forest(c, tested, ax)
    else:
        ax.set_axis_off()
        have = len(c.all.members)
        ax.text(0.5, 0.5, f"too few networks\nfor relations:\n{have}, at least {FEWEST}",
                ha="center", va="center", size=SMALL + 2, transform=ax.transAxes)  # fmt: skip
    if entries:
        left.legend(handles=entries, loc="outside lower left", ncols=min(6, len(entries)),
                    fontsize=SMALL, frameon=False, handletextpad=0.3)  # fmt: skip
    _caption(c, figure)
    return figure


def _styles(c: Comparison) -> tuple[list[Any], list[str], list[Line2D]]:
    """Return each network's colour and shape, and what the legend says of them."""
    by_size = sorted(c.axes, key=lambda a: -len(_levels(c, a)))
    count = len(c.networks)
    color: list[Any] = [LINE_COLORS[0]] * count
    shape = ["o"] * count
    entries = []
    if by_size:
        axis = by_size[0]
        levels = _levels(c, axis)
        palette = palette_of(len(levels))
        color = [palette[levels.index(_value(n.options.get(axis)))] for n in c.networks]
        entries += [_entry(f"{axis} = {v}", "o", k) for v, k in zip(levels, palette, strict=True)]
    if len(by_size) > 1:
        axis = by_size[1]
        levels = _levels(c, axis)
        if len(levels) <= len(SHAPES):
            shape = [SHAPES[levels.index(_value(n.options.get(axis)))] for n in c.networks]
            entries += [_entry(f"{axis} = {v}", SHAPES[i], "#606060") for i, v in enumerate(levels)]
    return color, shape, entries


def _entry(text: str, marker: str, color: Any) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, color=color, label=text, markersize=4)


def _value(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if number else str(value)


def _levels(c: Comparison, axis: str) -> list[str]:
    values = [n.options.get(axis) for n in c.networks]
    numbers = all(isinstance(v, int | float) for v in values)
    ordered = sorted(values) if numbers else sorted(values, key=str)  # type: ignore[type-var]
    return list(dict.fromkeys(_value(v) for v in ordered))


def _scatter(
    c: Comparison, name: str, ax: Axes, color: Sequence[Any], shape: Sequence[str]
) -> None:
    x, y, _ = _points(c, name)
    known = x[np.isfinite(x) & np.isfinite(y)]
    wide = known.min() > 0 and known.max() > WIDE * known.min()
    for i, network in enumerate(c.networks):
        if not (math.isfinite(x[i]) and math.isfinite(y[i])):
            continue
        error, gap_error = network.measures[name].error, network.gaps[c.gap][1]
        drawn = math.isfinite(error) and (not wide or error < x[i])
        ax.errorbar(x[i], y[i], xerr=error if drawn else None,
                    yerr=gap_error if math.isfinite(gap_error) else None, fmt=shape[i],
                    color=color[i], markersize=4, elinewidth=0.7, markeredgewidth=0.0)  # fmt: skip
    if wide:
        ax.set_xscale("log")
    ax.set_xlabel(name.replace("_", " "), size=SMALL + 1, parse_math=False)
    ax.tick_params(labelsize=SMALL)
    ax.tick_params(which="minor", labelbottom=False)
    ax.grid(alpha=0.25, linewidth=0.5)


def _forest(c: Comparison, tested: dict[str, Relation], ax: Axes) -> None:
    """Draw every statistic of every measure on its null interval, from top to bottom."""
    shown: dict[str, tuple[str, Any]] = {"τ": ("o", "black")}
    if c.axes:
        shown |= {f"ψ {a}": ("s", LINE_COLORS[(i + 1) % 6]) for i, a in enumerate(c.axes)}
    if len(c.axes) > 1:  # of one, Ψ is its ψ
        shown["Ψ"] = ("D", LINE_COLORS[0])
    places, labels, y = [], [], 0.0
    for name, relation in tested.items():
        found: dict[str, Tau] = {"τ": relation.tau}
        found |= {f"ψ {a}": t for a, t in relation.axes.items()}
        if relation.psi is not None and "Ψ" in shown:
            found["Ψ"] = relation.psi
        first = y
        for key, tau in found.items():
            if math.isfinite(tau.value):
                marker, color = shown[key]
                ax.plot([tau.low, tau.high], [y, y], color=NULL, linewidth=4.5, zorder=1,
                        solid_capstyle="butt")  # fmt: skip
                ax.plot(tau.value, y, marker, color=color, markersize=4, zorder=2)
            y += 1.0
        places.append((first + y - 1.0) / 2)
        labels.append(name.replace("_", " "))
        y += 0.8
    ax.axvline(0.0, color="black", linewidth=0.6, zorder=0)
    ax.set_xlim(-1.12, 1.12)
    ax.set_ylim(y, -1.0)
    ax.set_yticks(places, labels, size=SMALL, parse_math=False)
    ax.tick_params(axis="x", labelsize=SMALL)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(f"same order as the gap: {', '.join(dict.fromkeys(k[0] for k in shown))}",
                  size=SMALL + 1)  # fmt: skip
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=m, color=k, label=text, markersize=4)
        for text, (m, k) in shown.items()
    ]
    handles.append(Patch(color=NULL, label=f"{INSIDE:.0%} by chance"))
    ax.legend(handles=handles, fontsize=SMALL - 0.5, loc="lower center", ncols=2, frameon=False,
              bbox_to_anchor=(0.5, 1.0), handletextpad=0.3, columnspacing=0.8)  # fmt: skip


def _caption(c: Comparison, figure: Figure) -> None:
    planes = sorted({len(n.planes) for n in c.networks})
    many = f"{planes[0]}" if len(planes) == 1 else f"{planes[0]} to {planes[-1]}"
    words = [f"{len(c.networks)} networks, {many} plane{'s' if planes != [1] else ''} each",
             "bars: standard deviation over planes (of one plane, and of what does not depend on "
             "it, its own standard error), and of the gap its standard error"]  # fmt: skip
    if c.all.relations:
        words.append(f"grey: the middle {INSIDE:.0%} of {c.question.permutations} permutations of "
                     "the gaps; τ counts equal orders and names no cause")  # fmt: skip
    losses = [n.train_loss for n in c.networks if math.isfinite(n.train_loss)]
    if losses:
        words.append(f"training loss {min(losses):.3g} to {max(losses):.3g}"
                     + ("" if len(c.matched.members) == len(c.all.members)
                        else ": not matched"))  # fmt: skip
    width = figure.get_size_inches()[0]
    letters = int((width - 0.3) * 72 / (SMALL * 0.56))
    text = "\n".join(textwrap.wrap("; ".join(words) + ".", letters))
    figure.supxlabel(text, x=0.02, ha="left", fontsize=SMALL, color="#303030", parse_math=False)

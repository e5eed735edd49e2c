"""Curves: how far the loss rises with the radius, on average over directions and at worst.

A child run holds one row per direction or start vector; a picture shows their mean with a band of
1.96 standard errors over directions, or the highest that any climb found, which is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from lsweep.measures.from_children import Finished, rises
from lsweep.pictures.marks import SMALL, Z, put_legend, put_title
from lsweep.surfaces.scales import FloatArray, log_scale, number, round_ticks
from lsweep.surfaces.surface import Status

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

FEW = 5  # radii that are ticks themselves
LN = log_scale([1.0])
_UNITS = {
    "filter": ", relative to each filter's norm",
    "layer": ", relative to each layer's norm",
    "weight": ", relative to each weight",
}
_CLIMBS = {"1": (0, (4, 2)), "20": "-"}


def average(
    children: Sequence[Finished],
    labels: Sequence[str],
    colors: Sequence[str],
    ax: Axes,
    *,
    log: bool = False,
) -> list[str]:
    """Draw S(r) = E_d[L(θ + r d)] - L(θ), d and -d together, over the directions of each run.

    Args:
        children: with axes x (offset along a random direction) and y (its number).
        labels: of the runs; for one run alone its directions are drawn too.
        colors: one per run.
        ax: where.
        log: both axes logarithmic, as they are anyway where all means are positive: a rise of
            order r² is otherwise seen at the largest radii only.

    Returns:
        For each run what the caption must say of it; "" for nothing.
    """
    entries: list[Artist] = []
    told, means = [], []
    for child, label, color in zip(children, labels, colors, strict=True):
        whole = (child.surface.status != Status.PENDING).all(axis=1)
        radii, rise = rises(child.values("loss")[whole], child.surface.x)
        count = len(rise)
        known = np.isfinite(rise).all(axis=0)
        mean, se = mean_and_error(rise)
        means.append(mean[known])
        center = child.surface.center(f"{child.split}_loss")
        text = f"{label}, " if len(children) > 1 else ""
        text += f"loss {number(center)} at r = 0, {count} directions"
        entries += ax.plot(radii, mean, color=color, lw=1.6, zorder=3, label=text)
        if len(children) == 1:
            for k, line in enumerate(rise):
                few = "each direction" if k == 0 else "_"
                entries += ax.plot(radii, line, color=color, lw=0.6, alpha=0.35, label=few)[
                    : k == 0
                ]
        if count > 1:
            band = ax.fill_between(
                radii, mean - Z * se, mean + Z * se, color=color, alpha=0.2, lw=0, zorder=1,
                label=f"±{Z} s.e. over directions",
            )  # fmt: skip
            entries += [band] if len(children) == 1 else []
        words = [f"{count} of {len(whole)} directions are there"] if count < len(whole) else []
        if not known.all():
            words.append(f"from r = {number(radii[~known][0])} on some directions are not finite")
        told.append("; ".join(words))
    split = children[0].split
    frame(children, ax, f"mean rise of the {split} loss", log=log or _positive(means))
    put_title(ax, f"average over random directions{_band(children)}")
    put_legend(ax, entries, letters=70)
    return told


def _positive(curves: Sequence[FloatArray]) -> bool:
    return all(len(c) > 0 and bool((c > 0).all()) for c in curves)


def _band(children: Sequence[Finished]) -> str:
    return f" (±{Z} s.e.)" if len(children) > 1 else ""


def mean_and_error(rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return mean and standard error over the first dimension; NaN where one is not finite.

    >>> mean_and_error(np.array([[1.0, 1.0], [3.0, np.inf]]))
    (array([ 2., nan]), array([ 1., nan]))
    """
    if not len(rows):
        return np.full(rows.shape[1:], np.nan), np.full(rows.shape[1:], np.nan)
    with np.errstate(invalid="ignore"):
        good = np.where(np.isfinite(rows).all(axis=0), rows, np.nan)
        mean = good.mean(axis=0)
        if len(rows) < 2:
            return mean, np.full(mean.shape, np.nan)
        return mean, good.std(axis=0, ddof=1) / math.sqrt(len(rows))


def worst(
    children: Sequence[Finished],
    labels: Sequence[str],
    colors: Sequence[str],
    ax: Axes,
    *,
    unit: str = "filter",
    log: bool = False,
) -> list[str]:
    """Draw the highest rise that climbs of 1 and of 20 steps found within each radius.

    Args:
        children: with axes x (the radius) and y (start vector).
        labels: of the runs.
        colors: one per run.
        ax: where.
        unit: ``filter``: within r·‖w_f‖ for every filter; ``adaptive``: within r·|w| in norm.
        log: as of `average`; here the climbs of 20 steps decide.

    Returns:
        For each run what the caption must say of it.
    """
    entries: list[Artist] = []
    told, tops = [], []
    for child, label, color in zip(children, labels, colors, strict=True):
        lost = sunk = 0
        for steps, dash in _CLIMBS.items():
            found = child.values(f"worst_{unit}_{steps}")
            found = found[:1] if steps == "1" else found  # the others begin at the ball's edge
            lost += int(np.count_nonzero(~np.isfinite(found)))
            known = np.isfinite(found).any(axis=0)
            best = np.max(np.where(np.isfinite(found), found, -np.inf), axis=0)
            sunk += int(np.count_nonzero(best[known] <= 0))
            style: dict[str, Any] = {"color": color, "zorder": 3, "marker": "o", "ms": 3}
            radii = child.surface.x
            ax.plot(radii[known], best[known], ls=dash, lw=1.5, label=f"{label} {steps}", **style)
            for k in range(len(found)):  # how well the starts agree
                ax.plot(radii, found[k], ls="none", marker="_", ms=6, color=color, label="_")
        if len(children) > 1:
            entries.append(Line2D([], [], color=color, lw=1.5, label=label))
        tops.append(best[known])
        words = [f"{lost} climbs gave no number"] if lost else []
        words += [f"at {sunk} radii the highest is no rise"] if sunk else []
        told.append("; ".join(words))
    shade = colors[0] if len(children) == 1 else "#505050"
    for steps, dash in _CLIMBS.items():
        text = f"{steps} step{'s' if steps != '1' else ''} of ascent"
        entries.append(Line2D([], [], color=shade, ls=dash, lw=1.5, label=text))
    entries.append(Line2D([], [], color=shade, ls="none", marker="_", label="each start"))
    frame(
        children, ax, f"rise of the {children[0].split} loss, at least", log=log or _positive(tops)
    )
    within = "r·‖w‖ for each filter" if unit == "filter" else "r in units of each |w|"
    ax.set_xlabel("radius r")
    put_title(ax, f"worst case within {within}")
    put_legend(ax, entries, letters=70)
    return told


def frame(children: Sequence[Finished], ax: Axes, text: str, *, log: bool) -> None:
    """Label the axes of a curve over the radius and choose their scales."""
    plan = children[0].surface.provenance.get("plan", {})
    recipe = plan.get("directions", {}).get("x", {})
    ax.set_xlabel(f"radius r{_UNITS.get(recipe.get('normalize', ''), '')}")
    ax.set_ylabel(text, parse_math=False)
    ax.tick_params(labelsize=SMALL + 1)
    if log:
        ax.set_xscale("log")
        ax.set_yscale("log", nonpositive="clip")
        radii = np.concatenate([c.surface.x for c in children])
        tick, written = round_ticks(float(radii[radii > 0].min()), float(radii.max()), LN)
        ax.xaxis.set_minor_locator(NullLocator())
        if len(np.unique(radii)) <= FEW:
            tick = np.unique(radii)
            written = [number(r) for r in tick]
        ax.set_xticks(tick, written)
        ax.tick_params(which="both", labelsize=SMALL + 1)
    else:
        ax.axhline(0.0, color="#808080", lw=0.8, ls=(0, (1, 2)), zorder=0)
        ax.set_xlim(left=0.0)
        ax.margins(x=0.02)


def unmatched(children: Sequence[Finished]) -> str:
    """Say so when the runs were not trained to about the same loss, as the demo does; else "".

    Sharpness at unmatched loss can order networks the wrong way round.
    """
    losses = [c.surface.center(f"{c.split}_loss") for c in children]
    losses = [v for v in losses if math.isfinite(v)]
    if len(losses) < 2 or max(losses) <= 2 * min(losses) + 0.01:
        return ""
    return (
        f"The losses at the centre are NOT matched ({number(min(losses))} to "
        f"{number(max(losses))}): part of the difference may come from how well each was fitted."
    )

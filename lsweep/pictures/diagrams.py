"""Diagrams: the basins of a surface as births and deaths, and where they lie on the surface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from lsweep.measures.persistence import Pair, Persistence
from lsweep.pictures.marks import BLUE, SMALL, VERMILLION, describe, put_legend, put_title
from lsweep.surfaces.scales import FloatArray
from lsweep.surfaces.surface import Surface

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

SHALLOW = "#7F7F7F"
HUGE = 1e300  # a margin beyond it is no longer a float64
MOST = 30
"""Pairs that are drawn on the surface, the deepest; the diagram has all."""


def diagram(found: Persistence, surface: Surface, name: str, ax: Axes) -> None:
    """Draw birth against death: the height above the diagonal is a basin's depth.

    Filled are the pairs that count, hollow the others; squares have their minimum on the border.
    From the diagonal upwards the band is 3 standard errors of that pair's depth, or the threshold.
    """
    low, high, top = _limits(found, surface[name])
    ax.plot([low, high], [low, high], color="black", lw=0.8, zorder=1, label="diagonal")
    entries: list[Artist] = []
    bands = [(p, _band(found, p, high - low)) for p in found.pairs]
    for pair, noise in bands:
        if noise > 0:
            ax.plot([pair.birth] * 2, [pair.birth, pair.birth + noise], color=VERMILLION, lw=3,
                    alpha=0.3, solid_capstyle="butt", zorder=2, label="noise")  # fmt: skip
    if any(noise > 0 for _, noise in bands):
        text = "3 s.e. of the depth" + (" or threshold" if found.threshold else "")
        entries.append(Patch(color=VERMILLION, alpha=0.3, label=text))
    for counts, border, text in (
        (True, False, "deep"),
        (True, True, "deep, minimum on the border"),
        (False, False, "within noise"),
        (False, True, "within noise, on the border"),
    ):
        chosen = [p for p in found.pairs if found.counts(p) is counts and p.border is border]
        if chosen:
            births, deaths = [p.birth for p in chosen], [p.death for p in chosen]
            label = f"{text} ({len(chosen)})"
            style = _style(counts, border)
            entries += ax.plot(births, deaths, ls="none", zorder=4, label=label, **style)
    births = [p.birth for p in found.essential]
    label = "never dies: the lowest" if len(births) == 1 else f"never dies ({len(births)})"
    entries += ax.plot(births, [top] * len(births), "^", color="black", ms=6, label=label, zorder=4)
    if _decades(low, high):
        ax.set_xscale("log")
        ax.set_yscale("log")
    else:
        ax.locator_params(nbins=5)
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_aspect("equal", adjustable="box")
    ax.tick_params(labelsize=SMALL + 1)
    text = describe(surface, name)
    ax.set_xlabel(f"birth: {text} at the minimum", parse_math=False)
    ax.set_ylabel(f"death: {text} at the saddle", parse_math=False)
    many = "basin" if found.deep == 1 else "basins"
    put_title(ax, f"{found.deep or 'no'} {many} deeper than noise beside the lowest")
    put_legend(ax, entries, letters=50)


def _band(found: Persistence, pair: Pair, most: float) -> float:
    """Return the depth up to which a pair does not count, as far as it is seen."""
    noise = 0.0 if np.isnan(pair.noise) else pair.noise
    return float(min(max(found.threshold, noise), most))


def _decades(low: float, high: float) -> bool:
    """Whether an axis is logarithmic: over two decades, a rim would else hide the centre."""
    return low > 0 and high > 100 * low


def _limits(found: Persistence, values: FloatArray) -> tuple[float, float, float]:
    """Return the range of both axes, and the height at which what never dies is drawn."""
    ends = [p.birth for p in (*found.pairs, *found.essential)]
    finite = values[np.isfinite(values)]
    rim = [p.death for p in found.pairs] or [float(np.quantile(finite, 0.98))] * len(finite[:1])
    low, high = (min(ends + rim), max(ends + rim)) if ends else (0.0, 1.0)
    low, high = max(low, -HUGE), min(high, HUGE)
    if _decades(low, high):
        stretch = (high / low) ** 0.06
        return low / stretch, high * stretch**3, high * stretch**2
    margin = 0.06 * (high - low or abs(high) or 1.0)
    return low - margin, high + 3 * margin, high + 2 * margin


def _style(counts: bool, border: bool) -> dict[str, Any]:
    color = BLUE if counts else SHALLOW
    face = color if counts else "white"
    return {"marker": "s" if border else "o", "ms": 5, "mfc": face, "mec": color, "mew": 1.0}


def pairs_on(found: Persistence, surface: Surface, ax: Axes) -> str:
    """Draw minima and the saddles over which they are left; return what the caption must say.

    >>> from matplotlib.figure import Figure
    >>> from lsweep.measures.persistence import persistence
    >>> x = np.linspace(-1.5, 1.5, 31)
    >>> s = Surface({"x": x}, {"train_loss": (x**2 - 1) ** 2 + 0.1 * x})
    >>> pairs_on(persistence(s), s, Figure().add_subplot())
    'On the surface: a circle or square at a minimum, joined to its saddle, a cross.'
    """
    halo = [withStroke(linewidth=2.4, foreground="white")]
    shown = sorted(found.pairs, key=lambda p: (not found.counts(p), -p.depth))[:MOST]
    line = len(surface.axes) == 1
    for pair in shown:
        assert pair.saddle is not None, "a pair that dies has a saddle"
        counts = found.counts(pair)
        ends = (pair.minimum, pair.birth), (pair.saddle, pair.death)
        start, end = ((place[0], value) if line else place for place, value in ends)
        color = BLUE if counts else SHALLOW
        ax.plot(*zip(start, end, strict=True), color=color, lw=1.0, zorder=9, path_effects=halo,
                label="_")  # fmt: skip
        ax.plot(*([v] for v in start), ls="none", zorder=10, label="_",
                **_style(counts, pair.border))  # fmt: skip
        ax.plot(*([v] for v in end), "x", color=color, ms=5, mew=1.3, zorder=10, path_effects=halo,
                label="_")  # fmt: skip
    if not shown:
        return ""
    told = "On the surface: a circle or square at a minimum, joined to its saddle, a cross."
    rest = len(found.pairs) > len(shown)
    return told + (f" Of {len(found.pairs)} pairs the {MOST} deepest are there." if rest else "")

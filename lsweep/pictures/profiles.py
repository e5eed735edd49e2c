"""Profiles: how far the loss rises when one layer moves alone, as bars in the network's order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lsweep.measures.from_children import Finished, rises
from lsweep.pictures.curves import mean_and_error
from lsweep.pictures.marks import SMALL, Z, put_title
from lsweep.surfaces.scales import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LETTERS = 40
ROW = 0.165  # inches of a bar and its name


def height(children: Sequence[Finished]) -> float:
    """Return how high the bars of the deepest network are on the page, in inches.

    A name needs its own height, so a hundred layers make a long picture rather than a grey one.
    """
    return max(1.6, ROW * max(len(layer_names(c)) for c in children) + 0.3)


def layer_names(child: Finished) -> list[str]:
    """Return the names of the layers in the order of axis z."""
    return list(child.surface.provenance["plan"]["facts"]["layers"])


def width(children: Sequence[Finished]) -> float:
    """Return how wide a panel is with its names, in inches."""
    letters = max(len(n) for c in children for n in shortened(layer_names(c))[1])
    return 3.6 + 0.055 * letters


def shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return what all names begin with, in whole words, and what is written of each.

    Of a long name that is its beginning and its end, unless two would then look the same.

    >>> shortened(["net.layers.0.fc", "net.layers.1.fc"])
    ('net.layers.', ['0.fc', '1.fc'])
    >>> shortened(["a" * 60, "head"])[1][0]
    'aaaaaaaaaaaaaaaaaaaa…aaaaaaaaaaaaaaaaaaa'
    """
    modules = zip(*(n.split(".")[:-1] for n in names), strict=False)
    shared = itertools.takewhile(lambda words: len(names) > 1 and len(set(words)) == 1, modules)
    start = "".join(f"{words[0]}." for words in shared)
    rest = [n[len(start) :] for n in names]
    half = LETTERS // 2
    cut = [n if len(n) <= LETTERS else f"{n[:half]}…{n[1 - half :]}" for n in rest]
    return start, cut if len(set(cut)) == len(set(rest)) else rest


def profile(child: Finished, label: str, color: str, ax: Axes, *, log: bool = False) -> str:
    """Draw one bar per layer, the first on top, each with ±1.96 standard errors over directions.

    Args:
        child: with axes x (offset), y (direction) and z (layer).
        label: of the run, the title.
        color: of the bars.
        ax: where.
        log: logarithmic rise.

    Returns:
        What the caption must say of it.
    """
    radii, rise = rises(child.values("loss"), child.surface.x)
    start, written = shortened(layer_names(child))
    there = np.atleast_1d(np.isfinite(rise[:, :, -1]).all(axis=0))  # those that have all layers
    mean, se = mean_and_error(rise[:, there, -1].T)
    place = np.arange(len(written))
    size = min(SMALL, 0.8 * 72 * ROW)
    ax.barh(place, mean, height=0.7, color=color, alpha=0.75, zorder=2, label="mean rise")
    if there.sum() > 1:
        ax.errorbar(
            mean, place, xerr=Z * se, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5,
            zorder=3, label=f"±{Z} s.e.",
        )  # fmt: skip
    ax.set_yticks(place, written, fontsize=size, parse_math=False)
    ax.set_ylim(len(written) - 0.4, -0.6)
    if start:
        ax.set_ylabel(f"{start}…", parse_math=False)
    ax.tick_params(axis="x", labelsize=SMALL + 1)
    if log:
        ax.set_xscale("log", nonpositive="clip")
    else:
        ax.axvline(0.0, color="#808080", lw=0.8, zorder=1)
    ax.grid(axis="x", lw=0.4, alpha=0.5, zorder=0)
    ax.set_xlabel(f"mean rise of the {child.split} loss at r = {number(float(radii[-1]))}")
    put_title(ax, label)
    few = f"{int(there.sum())} of {len(there)} directions" if not there.all() else ""
    return "; ".join(filter(None, [few, f"Bars: mean over {int(there.sum())} directions with "
                                        f"±{Z} standard errors."]))  # fmt: skip

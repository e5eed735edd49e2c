"""Profiles: how far the loss rises when one layer moves alone, as bars in the network's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lsweep.curves import Z, mean_and_error
from lsweep.from_children import Finished, rises
from lsweep.marks import SMALL, put_title
from lsweep.scales import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LETTERS = 34
ROW = 0.165  # inches of a bar and its name


def height(children: Sequence[Finished]) -> float:
    """Return how high the bars of the deepest network are on the page, in inches.

    A name needs its own height, so a hundred layers make a long picture rather than a grey one.
    """
    return max(1.6, ROW * max(len(layer_names(c)) for c in children) + 0.3)


def layer_names(child: Finished) -> list[str]:
    """Return the names of the layers in the order of axis z."""
    return list(child.surface.provenance["plan"]["facts"]["layers"])


def short(name: str) -> str:
    """Return a name of at most 34 letters, its beginning and its end.

    >>> short("encoder.layers.encoder_layer_11.self_attention.out_proj")
    'encoder.layers.e…ttention.out_proj'
    """
    if len(name) <= _LETTERS:
        return name
    half = (_LETTERS - 1) // 2
    return f"{name[:half]}…{name[-(_LETTERS - 1 - half) :]}"


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
    names = layer_names(child)
    there = np.atleast_1d(np.isfinite(rise[:, :, -1]).all(axis=0))  # those that have all layers
    mean, se = mean_and_error(rise[:, there, -1].T)
    place = np.arange(len(names))
    size = min(SMALL, 0.8 * 72 * ROW)
    ax.barh(place, mean, height=0.7, color=color, alpha=0.75, zorder=2, label="mean rise")
    if there.sum() > 1:
        ax.errorbar(
            mean, place, xerr=Z * se, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5,
            zorder=3, label=f"±{Z} s.e.",
        )  # fmt: skip
    ax.set_yticks(place, [short(n) for n in names], fontsize=size, parse_math=False)
    ax.set_ylim(len(names) - 0.4, -0.6)
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

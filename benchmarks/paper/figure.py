"""One picture: what depth does to plain and to residual networks, by two numbers."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from lsweep.pictures.marks import BLUE, VERMILLION

from .evidence import Measured, each, networks

COLORS = {"plain": VERMILLION, "skip": BLUE}
LABELS = {"plain": "without skip connections", "skip": "with skip connections"}
PANELS = {
    "nc10": "non-convex share of the plane",
    "rise": "sharpness: rise of the loss at r = 0.2",
}


def draw(measured: Measured, path: Path) -> None:
    """Draw non-convexity and sharpness over depth; every dot is one training seed."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(8.4, 3.4), layout="constrained")
    for ax, name in zip(axes, PANELS, strict=True):
        panel(ax, measured, name)
    axes[0].legend(frameon=False, loc="upper left")
    figure.suptitle("Depth with and without skip connections, at matched training loss")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def panel(ax: Axes, measured: Measured, name: str) -> None:
    """Draw one number over depth for both kinds."""
    for kind, color in COLORS.items():
        names = [n for n in networks(measured, "depth") if n.startswith(kind)]
        depths = [int(n.split()[1]) for n in names]
        values = [each(measured, "depth", n, name) for n in names]
        ax.plot(depths, [mean(v) for v in values], color=color, label=LABELS[kind])
        for depth, seeds in zip(depths, values, strict=True):
            ax.plot([depth] * len(seeds), seeds, "o", color=color, markersize=4, alpha=0.7)
    ax.set_xticks(depths)
    ax.set_xlabel("linear layers")
    ax.set_title(PANELS[name], fontsize="medium")
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)

"""Spectra: the density of the Hessian's eigenvalues, its negative part in a colour of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Patch

from lsweep.from_children import Finished, spectrum
from lsweep.marks import BLUE, SMALL, VERMILLION, put_legend, put_title
from lsweep.scales import number
from lsweep.spectrum import density, grid, negative_mass, threshold, width

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Z = 1.96


def spectra(
    children: Sequence[Finished],
    labels: Sequence[str],
    colors: Sequence[str],
    ax: Axes,
    *,
    log: bool = False,
) -> list[str]:
    """Draw φ(t) of each run on a logarithmic axis, and its Ritz values as ticks.

    Args:
        children: with axis x (start vector) and the variables of metric ``spectrum``.
        labels: of the runs.
        colors: one per run; of one alone, what is negative is vermillion and the rest blue.
        ax: where.
        log: eigenvalues on a scale that is logarithmic on both sides of ±1 % of the largest.

    Returns:
        For each run what the caption must say of it.
    """
    entries: list[Artist] = []
    told, peaks, floors, edge = [], [], [], 0.0
    for k, (child, label, color) in enumerate(zip(children, labels, colors, strict=True)):
        places, weights = spectrum(child)
        there = weights.sum(axis=1) > 0  # a start vector that is pending has no weight
        if not there.any():
            told.append("no start vector is there yet")
            continue
        places, weights = places[there], weights[there]
        sigma, tau = width(places, weights), threshold(places, weights)
        edge = max(edge, tau)
        at = grid(places, weights, sigma)
        phi = density(places, weights, at, sigma)
        count = child.surface.provenance.get("plan", {}).get("facts", {}).get("parameters", 10**6)
        floors.append(0.3 / (count * sigma * np.sqrt(2 * np.pi)))
        peaks.append(float(phi.value.max()))
        mass = negative_mass(places, weights)
        share = f"{number(float(mass.value))}"
        if np.isfinite(mass.se):
            share += f" ± {number(float(mass.se), 2)}"
        (line,) = ax.plot(at, phi.value, color=color, lw=1.2, zorder=3, label=label)
        if len(children) == 1:
            below = at < -tau
            parts = ((~below, BLUE, "density"), (below, VERMILLION, f"negative: {share} of all"))
            for where, shade, text in parts:
                ax.fill_between(
                    at,
                    0,
                    phi.value,
                    where=where.tolist(),
                    color=shade,
                    alpha=0.35,
                    lw=0,
                    label=text,
                )
                entries.append(Patch(color=shade, alpha=0.5, label=text))
        else:
            line.set_label(f"{label}, negative share {share}")
            entries.append(line)
        if np.isfinite(phi.se).all():
            low, high = phi.value - Z * phi.se, phi.value + Z * phi.se
            ax.fill_between(
                at, np.maximum(low, floors[-1] / 10), high, color=color, alpha=0.25, lw=0, label="_"
            )
        ritz = places[weights > 0]
        ticks = ax.plot(
            ritz, np.full(len(ritz), 0.012 * (k + 1)), "|", color=color, ms=4, mew=0.4, alpha=0.6,
            transform=ax.get_xaxis_transform(), label="Ritz values", zorder=4,
        )  # fmt: skip
        entries += ticks if k == 0 else []
        told.append(
            f"{len(places)} of {len(there)} start vectors, Gaussians of standard deviation "
            f"{number(sigma)}, negative below {number(-tau)} (1 % of the largest |λ|)"
        )
    ax.axvline(0.0, color="#808080", lw=0.8, ls=(0, (1, 2)), zorder=0)
    ax.set_yscale("log")
    if peaks:
        ax.set_ylim(min(floors), 3 * max(peaks))
    if log and edge:
        ax.set_xscale("symlog", linthresh=edge)
    ax.set_xlabel("eigenvalue λ of the Hessian")
    ax.set_ylabel("density φ(λ), log scale")
    ax.tick_params(labelsize=SMALL + 1)
    put_title(ax, "spectral density")
    put_legend(ax, entries, letters=92)
    return told

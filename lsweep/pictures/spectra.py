"""Spectra: the density of the Hessian's eigenvalues, its negative part in a colour of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Patch

from lsweep.derivatives.spectrum import Estimate, density, grid, negative_mass, threshold, width
from lsweep.measures.from_children import Finished, spectrum
from lsweep.pictures.marks import BLUE, SMALL, VERMILLION, Z, put_legend, put_title
from lsweep.surfaces.scales import FloatArray, number

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


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
        at = grid(places, weights, sigma)
        phi = density(places, weights, at, sigma)
        facts = child.surface.provenance.get("plan", {}).get("facts", {})
        one = 1 / (facts.get("curved", facts.get("parameters", 10**6)) * sigma * np.sqrt(2 * np.pi))
        floors.append(0.3 * one)  # just below the peak of a single eigenvalue
        peaks.append(float(phi.value.max()))
        edge = max(edge, tau)
        mass = negative_mass(places, weights)
        share = _text(mass)
        (line,) = ax.plot(at, phi.value, color=color, lw=1.2, zorder=3, label=label)
        if len(children) == 1:
            # Of the negative ones their own density: the peak at 0 is wider than what it stands
            # for, and its left flank would be coloured as if it were negative.
            below = density(places, np.where(places < -tau, weights, 0.0), at, sigma).value
            entries += _filled(ax, at, phi.value, BLUE, 0.12, "density")
            if float(mass.value) > 0:
                entries += _filled(ax, at, below, VERMILLION, 0.75, f"negative: {share} of all")
        else:
            line.set_label(f"{label}, negative share {share}")
            entries.append(line)
        if np.isfinite(phi.se).all():
            low, high = np.maximum(phi.value - Z * phi.se, one / 100), phi.value + Z * phi.se
            band = _filled(ax, at, high, color, 0.4, f"±{Z} s.e. over start vectors", low)
            entries += band if k == 0 else []
        ritz = places[weights > 0]
        ticks = ax.plot(
            ritz, np.full(len(ritz), 0.012 + 0.024 * k), "|", color=color, ms=5, mew=0.6, alpha=0.7,
            transform=ax.get_xaxis_transform(), label="Ritz values", zorder=4,
        )  # fmt: skip
        entries += ticks if k == 0 else []
        told.append(
            f"{len(places)} of {len(there)} start vectors, Gaussians of standard deviation "
            f"{number(sigma)}, negative below {number(-tau)} (1 % of the largest |λ|)"
            + ("." if float(mass.value) > 0 else ": none is.")
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


def _text(mass: Estimate) -> str:
    text = number(float(mass.value))
    return f"{text} ± {number(float(mass.se), 2)}" if np.isfinite(mass.se) else text


def _filled(
    ax: Axes,
    at: FloatArray,
    height: FloatArray,
    color: str,
    alpha: float,
    text: str,
    low: FloatArray | float = 0.0,
) -> list[Artist]:
    ax.fill_between(at, low, height, color=color, alpha=alpha, lw=0, label=text)
    return [Patch(color=color, alpha=alpha, label=text)]

"""Figures: which picture shows which measure, and where what it needs is found.

A measure at the centre lies in a child run of the runs that are drawn, or is itself the run that is
drawn; what only needs the surface takes that. What is missing is said with its command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lsweep.errors import LsweepError
from lsweep.measures.from_children import Finished
from lsweep.measures.persistence import persistence
from lsweep.merging.opening import open_surface
from lsweep.pictures.bending import add_bands, of_plane, of_whole
from lsweep.pictures.cells import pooled_scale
from lsweep.pictures.curves import average, unmatched, worst
from lsweep.pictures.diagrams import diagram, pairs_on
from lsweep.pictures.drawing import save, write_caption
from lsweep.pictures.lines import line
from lsweep.pictures.maps import filled
from lsweep.pictures.marks import BLUE, default_name, lengths, palette_of
from lsweep.pictures.profiles import height, profile, width
from lsweep.pictures.spectra import spectra
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Surface


class Missing(LsweepError):
    """What a picture needs has not been computed."""


@dataclass(frozen=True)
class Source:
    """One run, or one surface file, of which a picture is asked.

    Attributes:
        path: of a run, of one of its children, or of a surface file.
        label: by which the picture tells it from others.
    """

    path: Path
    label: str = ""

    @cached_property
    def surface(self) -> Surface:
        """Its own surface."""
        return open_surface(self.path)

    def child(self, name: str) -> Finished:
        """Return the child run that holds a measure, or the source itself where it is that.

        Raises:
            Missing: nobody has computed it.
        """
        folder = RunFolder(self.path)
        if folder.child(name).exists:
            return self._ready(name, open_surface(folder.child(name).root))
        if _HOLDS[name](self.surface):
            return self._ready(name, self.surface)
        if not folder.exists:
            raise Missing(f"{self.path} holds no {name}: give the run that it belongs to")
        raise Missing(
            f"{self.path} has no {name} yet: 'lsweep run {self.path} --measures {name}' computes it"
        )

    def _ready(self, name: str, surface: Surface) -> Finished:
        child = Finished(name, surface, {})
        if not surface.evaluated.any():
            raise Missing(f"{name} of {self.path} has no point yet: 'lsweep run {self.path} "
                          f"--measures {name}' goes on")  # fmt: skip
        return child


def _kinds(surface: Surface) -> tuple[str, ...]:
    """Return the kinds of a surface's axes, x first; none where its plan is not known."""
    directions = surface.provenance.get("plan", {}).get("directions", {})
    return tuple(directions[a]["kind"] for a in surface.axes if a in directions)


def _has(variable: str) -> Callable[[Surface], bool]:
    return lambda surface: any(n.endswith(f"_{variable}") for n in surface.values)


_HOLDS: dict[str, Callable[[Surface], bool]] = {
    "sharpness": lambda s: _kinds(s) == ("random", "replicate"),
    "layers": lambda s: _kinds(s) == ("random", "replicate", "layer"),
    "worst": _has("worst_filter_20"),
    "spectrum": _has("ritz_weight_00"),
    "convexity": lambda s: _has("hessian_ratio")(s) and "replicate" not in _kinds(s),
}


@dataclass(frozen=True)
class Options:
    """How a measure is drawn.

    Attributes:
        name: the variable of the surface, for what is taken from the surface; None: the first.
        log: logarithmic axes; a spectrum's density always is.
    """

    name: str | None = None
    log: bool = False


@dataclass
class _Layout:
    """A figure with what its caption says."""

    figure: Figure
    shown: list[Surface] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    last: str = ""

    def add(self, surface: Surface, title: str, told: str = "") -> None:
        self.shown.append(surface)
        self.titles.append(title)
        self.told.append(told)


def _page(widths: Sequence[float], high: float) -> tuple[Figure, list[Axes]]:
    """Return a row of panels, each with room for its colour bar or its names."""
    figure = Figure(figsize=(sum(widths), high), layout="constrained")
    grid = figure.add_gridspec(1, len(widths), width_ratios=list(widths))
    return figure, [figure.add_subplot(grid[0, k]) for k in range(len(widths))]


def _several(sources: Sequence[Source], name: str) -> tuple[list[Finished], list[str], list[str]]:
    children = [s.child(name) for s in sources]
    return children, [s.label for s in sources], palette_of(len(children))


def _sharpness(sources: Sequence[Source], options: Options) -> _Layout:
    """The average beside the worst case, where that is there."""
    children, labels, colors = _several(sources, "sharpness")
    climbs = None
    try:
        climbs = [s.child("worst") for s in sources]
    except Missing:
        climbs = None
    figure, axes = _page([4.9] * (2 if climbs else 1), 3.7)
    told = average(children, labels, colors, axes[0], log=options.log)
    layout = _Layout(figure, last=unmatched(children))
    for child, label, words in zip(children, labels, told, strict=True):
        layout.add(child.surface, label, words)
    if climbs:
        more = worst(climbs, labels, colors, axes[1], log=options.log)
        layout.told = [" ".join(filter(None, t)) for t in zip(layout.told, more, strict=True)]
    return layout


def _worst(sources: Sequence[Source], options: Options) -> _Layout:
    """Within filters' norms, and within the adaptive ball."""
    children, labels, colors = _several(sources, "worst")
    figure, axes = _page([4.9, 4.9], 3.7)
    layout = _Layout(figure)
    told = [
        worst(children, labels, colors, ax, unit=unit, log=options.log)
        for unit, ax in zip(("filter", "adaptive"), axes, strict=True)
    ]
    for child, label, *words in zip(children, labels, *told, strict=True):
        layout.add(child.surface, label, "; ".join(filter(None, words)))
    return layout


def _spectrum(sources: Sequence[Source], options: Options) -> _Layout:
    children, labels, colors = _several(sources, "spectrum")
    figure, axes = _page([6.2], 3.9)
    layout = _Layout(figure)
    told = spectra(children, labels, colors, axes[0], log=options.log)
    for child, label, words in zip(children, labels, told, strict=True):
        layout.add(child.surface, label, words)
    return layout


def _layers(sources: Sequence[Source], options: Options) -> _Layout:
    children, labels, _ = _several(sources, "layers")
    figure, axes = _page([width(children)] * len(children), height(children) + 0.9)
    layout = _Layout(figure)
    for child, label, ax in zip(children, labels, axes, strict=True):
        title = label if len(children) > 1 else "one layer moved at a time"
        layout.add(child.surface, label, profile(child, title, BLUE, ax, log=options.log))
    high = max(float(ax.get_xlim()[1]) for ax in axes)
    for ax in axes:  # one scale, so that bars of two networks compare
        ax.set_xlim(right=high)
    return layout


def _convexity(sources: Sequence[Source], options: Options) -> _Layout:
    """The plane's own Hessian, which is free, beside the whole one, where that is there."""
    (source,) = _one(sources, "convexity")
    whole, why = None, ""
    try:
        whole = source.child("convexity")
    except Missing as e:
        why = str(e)
    plane = None if whole is not None and whole.surface is source.surface else source.surface
    if plane is not None and (len(plane.axes) != 2 or min(plane.shape) < 3):
        plane = None
    if plane is None and whole is None:
        raise Missing(f"{why}; the surface itself is no plane of 3 x 3 points")
    shown = [s for s in (plane, whole.surface if whole else None) if s is not None]
    figure, axes = _page([4.4] * len(shown), 3.4 * _flatness(shown[0]) + 1.0)
    layout = _Layout(figure, last=why and f"Not the whole Hessian: {why}.")
    if plane is not None:
        of_plane(plane, options.name or default_name(plane), axes[0])
        layout.add(plane, "plane")
    if whole is not None:
        layout.add(whole.surface, "whole Hessian", of_whole(whole, axes[-1]))
    add_bands(axes)
    return layout


def _persistence(sources: Sequence[Source], options: Options) -> _Layout:
    (source,) = _one(sources, "persistence")
    surface = source.surface
    if len(surface.axes) > 2:
        raise Missing(f"{source.path} has three axes: persistence is that of a line or a plane")
    name = options.name or default_name(surface)
    if not np.isfinite(surface[name]).any():
        raise Missing(f"no value of {name} in {source.path} is finite: it has no basins")
    found = persistence(surface, name)
    figure, axes = _page([5.0, 4.6], 4.3)
    if len(surface.axes) == 1:
        line(surface, name, axes[0])
    else:
        scale = pooled_scale([surface], name, log=True)  # a basin near the centre is shallow
        filled(surface, name, axes[0], scale=scale)
    told = pairs_on(found, surface, axes[0])
    diagram(found, surface, name, axes[1])
    layout = _Layout(figure)
    joined = f"{found.neighbours} neighbours to a point"
    layout.add(
        surface, source.label, " ".join(filter(None, [told, *_stops([joined, *found.notes])]))
    )
    return layout


def _stops(notes: Sequence[str]) -> list[str]:
    return [f"{n[0].upper()}{n[1:]}." for n in notes]


def _one(sources: Sequence[Source], kind: str) -> Sequence[Source]:
    if len(sources) != 1:
        raise LsweepError(f"--kind {kind} draws one run, not {len(sources)}: draw them apart")
    return sources


def _flatness(surface: Surface) -> float:
    sides = lengths(surface)
    return 1.0 if sides is None else min(max(sides[1] / sides[0], 0.4), 1.6)


FIGURES: dict[str, Callable[[Sequence[Source], Options], _Layout]] = {
    "sharpness": _sharpness,
    "worst": _worst,
    "spectrum": _spectrum,
    "layers": _layers,
    "convexity": _convexity,
    "persistence": _persistence,
}


def figure_of(
    paths: Sequence[Path],
    kind: str,
    output: Path | None = None,
    options: Options | None = None,
    dpi: float = 150,
) -> Figure:
    """Draw one measure of runs into one figure, with its caption, and save it.

    Args:
        paths: runs, their children, or surface files.
        kind: one of `FIGURES`.
        output: ``.png``, ``.pdf`` or ``.svg``; None saves nothing.
        options: how.
        dpi: dots per inch of a PNG.

    Raises:
        Missing: it has not been computed; the text has the command that does.
        LsweepError: a path holds no run and no surface.
    """
    named = [p.absolute().stem for p in paths]
    labels = named if len(set(named)) == len(named) else [str(p) for p in paths]
    sources = [Source(p, label) for p, label in zip(paths, labels, strict=True)]
    return _drawn(sources, kind, output, options or Options(), dpi)


def _drawn(
    sources: Sequence[Source], kind: str, output: Path | None, options: Options, dpi: float
) -> Figure:
    layout = FIGURES[kind](sources, options)
    write_caption(layout.figure, layout.shown, layout.titles, layout.told, layout.last)
    if output is not None:
        save(layout.figure, output, dpi=dpi)
    return layout.figure


def draw_measures(folder: RunFolder) -> list[Path]:
    """Draw every measure of a run that is there into its ``figures/``; return the pictures."""
    source = Source(folder.root, folder.root.stem)
    folder.figures.mkdir(exist_ok=True)
    drawn = []
    for kind in FIGURES:
        path = folder.figures / f"{kind}.png"
        try:
            _drawn([source], kind, path, Options(), 150)
        except Missing:
            continue
        drawn.append(path)
    return drawn

"""Pictures: a surface, or several on one scale, as a figure that can be printed as it is.

`draw` draws one surface into one Axes; `render` lays out several with a caption and saves them.
Figures are made without pyplot, so no display and no global state is needed.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lsweep.errors import LsweepError, nearest
from lsweep.merging.opening import open_surface
from lsweep.pictures.cells import as_plane, plane_at, pooled_scale
from lsweep.pictures.lines import line, line_scale
from lsweep.pictures.maps import add_bar, contour, filled, heat
from lsweep.pictures.marks import (
    SMALL,
    default_name,
    describe,
    dot_evaluated,
    lengths,
    palette_of,
    put_title,
)
from lsweep.pictures.reliefs import relief
from lsweep.storage.files import write_whole
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.scales import Scale
from lsweep.surfaces.surface import Surface

__all__ = ["KINDS", "contour", "draw", "filled", "heat", "line", "relief", "render", "save"]

KINDS: dict[str, Callable[..., Axes]] = {
    "line": line,
    "contour": contour,
    "filled": filled,
    "heat": heat,
    "3d": relief,
}

# Nothing in a saved file depends on when or where it was saved.
_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None},
    ".svg": {"Date": None},
}


def draw(
    surface: Surface,
    name: str | None = None,
    *,
    kind: str = "auto",
    ax: Axes | None = None,
    log: bool | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    points: bool = False,
    z: float | None = None,
) -> Axes:
    """Draw one surface into one Axes and return it.

    Args:
        surface: one axis (a line), two (a map), or three (the map at ``z``).
        name: the variable; None for ``train_loss`` or the first metric. A line then shows the
            loss and the accuracy of every split.
        kind: ``line``, ``contour``, ``filled``, ``heat``, ``3d``; ``auto`` is line or filled.
        ax: where; None makes a figure of its own, with the caption.
        log: ln, or asinh where a value is not positive (`lsweep.surfaces.scales.log_scale`); None:
            where the scale spans more than two decades.
        vmin: lowest level; None for the minimum.
        vmax: highest level; None for the 98 % quantile where the rest would take more than a
            fifth of the colours, or all of a log scale in 3d. What is
            beyond is hatched.
        points: show which points were evaluated; the others are interpolated or pending.
        z: of three axes, which plane, the nearest; None for the middle.

    An unknown kind or variable, a kind that does not fit the axes, and vmin above vmax are each
    an `LsweepError`.

    >>> import numpy as np
    >>> s = Surface({"x": np.arange(3.0), "y": np.arange(2.0)}, {"a": np.arange(6.0).reshape(2, 3)})
    >>> draw(s, kind="heat").get_title()
    'loss landscape'
    """
    kind = _kind([surface], kind, points)
    surface = surface if z is None else plane_at(surface, z)
    figure = None
    if ax is None:
        figure, axes = _page([surface], kind)
        ax = axes[0]
    scale = _scale([surface], name, kind, log=log, vmin=vmin, vmax=vmax)
    KINDS[kind](surface, name, ax, scale=scale)
    told = _dot([surface], [ax], kind) if points else []
    if figure is not None:
        write_caption(figure, [surface], [""], told)
    return ax


def draw_run(surface: Surface, folder: RunFolder) -> Path:
    """Draw a run's first picture, its first metric, and return where it lies."""
    folder.figures.mkdir(exist_ok=True)
    picture = folder.figures / f"{surface.metrics[0]}.png"
    render(surface, picture)
    return picture


def render(
    surfaces: Surface | str | os.PathLike[str] | Sequence[Surface | str | os.PathLike[str]],
    path: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    kind: str = "auto",
    log: bool | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    labels: Sequence[str] | None = None,
    dpi: float = 150,
    points: bool = False,
    z: Sequence[float] = (),
) -> Figure:
    """Draw surfaces on one scale, write the caption below them, and save the figure.

    Several lines share one Axes; several maps stand side by side with one colour bar.

    Args:
        surfaces: one or several, or paths of runs or files; all of them lines or all of them not.
        path: ``.png``, ``.pdf`` or ``.svg``, written whole or not at all; None saves nothing.
        name: as in `draw`.
        kind: as in `draw`.
        log: as in `draw`.
        vmin: as in `draw`.
        vmax: as in `draw`.
        labels: one per surface; None for their titles.
        dpi: dots per inch of a PNG, and of what is stored as dots in the others.
        points: as in `draw`.
        z: of three axes, which planes, each with a picture of its own; none for the middle.

    Raises:
        LsweepError: as `draw`; also a suffix that is not known, or labels that do not match.

    >>> import numpy as np
    >>> s = Surface({"x": np.arange(3.0), "y": np.arange(2.0)}, {"a": np.arange(6.0).reshape(2, 3)})
    >>> [ax.get_title() for ax in render([s, s], labels=["A", "B"]).axes]
    ['A', 'B']
    """
    if path is not None:
        _format(Path(path))
    given: Sequence[Surface | str | os.PathLike[str]]
    given = [surfaces] if isinstance(surfaces, Surface | str | os.PathLike) else list(surfaces)
    if not given:
        raise LsweepError("no surface to render")
    shown = [s if isinstance(s, Surface) else open_surface(s) for s in given]
    kind = _kind(shown, kind, points)
    if labels is not None and len(labels) != len(shown):
        raise LsweepError(f"{len(labels)} labels for {len(shown)} surfaces: give one for each")
    if z:
        given = shown = [plane_at(s, at) for s in shown for at in z]
        if labels is not None:
            ends = [s.title.rpartition(", ")[2] for s in shown]
            labels = [f"{t}, {e}" for t, e in zip(np.repeat(labels, len(z)), ends, strict=True)]
    texts = list(labels) if labels is not None else _titles(given, shown, kind)
    scale = _scale(shown, name, kind, log=log, vmin=vmin, vmax=vmax)
    figure, axes = _page(shown, kind)
    if kind == "line":
        several = len(shown) > 1
        for surface, text, own in zip(shown, texts, palette_of(len(shown)), strict=True):
            color = own if several else None
            line(surface, name, axes[0], scale=scale, color=color, label=text if several else None)
        put_title(axes[0], _common_title(shown) if several else texts[0])
    else:
        for surface, text, ax in zip(shown, texts, axes, strict=True):
            KINDS[kind](surface, name, ax, scale=scale, bar=False)
            put_title(ax, text)
        variable = default_name(shown[0]) if name is None else name
        add_bar(axes, scale, describe(shown[0], variable), kind)
    told = _dot(shown, [axes[0]] * len(shown) if kind == "line" else axes, kind) if points else []
    write_caption(figure, shown, texts, told)
    if path is not None:
        save(figure, path, dpi=dpi)
    return figure


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: float = 150) -> None:
    """Save a figure by its suffix, whole or not at all; equal figures give equal bytes.

    Raises:
        LsweepError: the suffix is not known, or the folder cannot be written.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> save(Figure(), folder / "empty.svg")
    >>> [p.name for p in folder.iterdir()]
    ['empty.svg']
    """
    suffix = _format(Path(path))
    image = io.BytesIO()
    # Ids and fonts as journals want them, the same in every run.
    with matplotlib.rc_context({"svg.hashsalt": "lsweep", "pdf.fonttype": 42}):
        figure.savefig(
            image,
            format=suffix[1:],
            dpi=dpi,
            metadata=_FORMATS[suffix],
            bbox_inches="tight",
            pad_inches=0.08,
            facecolor="white",
        )
    write_whole(path, image.getvalue())


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise LsweepError(f"cannot draw {path.name}: the suffix is one of {', '.join(_FORMATS)}")
    return suffix


def _dot(surfaces: Sequence[Surface], axes: Sequence[Axes], kind: str) -> list[str]:
    """Show which points were evaluated; return what the caption says of each surface's."""
    planes = surfaces if kind == "line" else [as_plane(s) for s in surfaces]
    return [dot_evaluated(s, ax) for s, ax in zip(planes, axes, strict=True)]


def _kind(surfaces: Sequence[Surface], kind: str, points: bool = False) -> str:
    """Return the kind that all surfaces are drawn as."""
    if kind != "auto" and kind not in KINDS:
        raise LsweepError(f"kind = {kind!r}{nearest(kind, ['auto', *KINDS])}")
    lines = {len(s.axes) == 1 for s in surfaces}
    if len(lines) > 1:
        raise LsweepError("lines and planes cannot stand on one scale: render them apart")
    if kind == "line" and False in lines:
        raise LsweepError("kind = 'line' needs a surface with one axis; of a plane: 'filled'")
    if kind not in ("auto", "line") and True in lines:
        raise LsweepError(f"kind = {kind!r} needs a surface with two axes; of a line: 'line'")
    if kind == "3d" and points:
        raise LsweepError("kind = '3d' shows no points: draw them on 'filled', 'contour' or 'heat'")
    return ("line" if True in lines else "filled") if kind == "auto" else kind


def _scale(surfaces: Sequence[Surface], name: str | None, kind: str, **options: Any) -> Scale:
    if kind == "line":
        return line_scale(surfaces, name, **options)
    variable = default_name(surfaces[0]) if name is None else name
    planes = [as_plane(s) for s in surfaces]
    return pooled_scale(planes, variable, whole=kind == "3d", **options)


def _titles(given: Sequence[Any], shown: Sequence[Surface], kind: str) -> list[str]:
    """Return titles that tell the surfaces apart: their own, else their files', else numbers."""
    titles = [(s if kind == "line" else as_plane(s)).title for s in shown]
    if len(set(titles)) == len(titles):
        return titles
    files = [None if isinstance(s, Surface) else str(Path(s)) for s in given]
    marks = [f or str(i) for i, f in enumerate(files, 1)]
    if kind == "line":
        return marks
    return [f"{title}\n{mark}" for title, mark in zip(titles, marks, strict=True)]


def _common_title(shown: Sequence[Surface]) -> str:
    titles = {s.title for s in shown}
    return titles.pop() if len(titles) == 1 else ""


def _page(surfaces: Sequence[Surface], kind: str) -> tuple[Figure, list[Axes]]:
    """Return a figure whose panels have about the shape that their axes will have."""
    if kind == "line":
        figure = Figure(figsize=(5.6, 3.9), layout="constrained")
        return figure, [figure.add_subplot()]
    count = len(surfaces)
    columns = min(count, 4 if count > 4 else 3) if count != 4 else 2
    rows = math.ceil(count / columns)
    width = 4.4 if count == 1 else 3.5
    sides = [lengths(as_plane(s)) for s in surfaces]
    ratio = max(1.0 if side is None else side[1] / side[0] for side in sides)
    height = width * min(max(ratio, 0.3), 1.6) if kind != "3d" else width * 0.95
    figure = Figure(figsize=(columns * width + 0.9, rows * (height + 1.1)), layout="constrained")
    options = {"projection": "3d"} if kind == "3d" else {}
    axes = [figure.add_subplot(rows, columns, i + 1, **options) for i in range(count)]
    return figure, axes


def write_caption(
    figure: Figure,
    surfaces: Sequence[Surface],
    titles: Sequence[str],
    told: Sequence[str] = (),
    last: str = "",
) -> None:
    """Write the captions, equal ones once, below the figure, which grows by their lines.

    Args:
        figure: that is otherwise done.
        surfaces: those shown.
        titles: whose caption it is, where they differ.
        told: what else there is to say of each surface.
        last: what there is to say of all of them together.
    """
    named: dict[str, list[str]] = {}
    for surface, title, more in zip(surfaces, titles, told or [""] * len(surfaces), strict=True):
        caption = surface.provenance.get("caption")
        caption = f"{caption if isinstance(caption, str) else ''} {more}".strip()
        if caption:
            named.setdefault(caption, []).append(title.replace("\n", ", "))
    whose = len(named) > 1
    texts = [f"{', '.join(t)}: {caption}" if whose else caption for caption, t in named.items()]
    texts += [last] if last else []
    width, height = figure.get_size_inches()
    letters = int((width - 0.3) * 72 / (SMALL * 0.56))
    lines = [
        part
        for t in texts
        for p in t.splitlines()
        for part in textwrap.wrap(p, letters, break_on_hyphens=False)
    ]
    if lines:
        figure.set_size_inches(width, height + len(lines) * SMALL * 1.3 / 72 + 0.1)
        figure.supxlabel(
            "\n".join(lines), x=0.02, ha="left", fontsize=SMALL, color="#303030", parse_math=False
        )

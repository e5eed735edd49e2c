"""`lsweep convert`: one file in, one out, as the target's suffix and the source's content say.

===================  ==========================================================================
a surface            to ``.vts``, ``.vtp`` (ParaView), ``.csv``, ``.npz``
... lsweep's own     to ``.h5``: a surface file of the reference implementation
... the reference's  to ``.h5``: an lsweep surface
... an ``.npz``      to ``.h5``: the lsweep surface that it was made from
a direction file     of the reference implementation to ``.npz`` and back to ``.h5``
===================  ==========================================================================

``.csv`` and ``.npz`` hold every float64 exactly.
"""

from __future__ import annotations

import csv
import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from lsweep.errors import LsweepError
from lsweep.storage.files import write_whole
from lsweep.storage.foreign import first_bytes
from lsweep.surfaces import npz, reference, vtk
from lsweep.surfaces.reference import Directions
from lsweep.surfaces.surface import Status, Surface

SUFFIXES = (".h5", ".hdf5", ".vts", ".vtp", ".csv", ".npz")


def convert(
    source: Surface | str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    name: str | None = None,
    log: bool = False,
) -> str:
    """Write ``source`` in the format that the suffix of ``target`` names, whole or not at all.

    Args:
        source: a surface, or a file: ``surface.h5``, ``.npz``, or a surface or direction file of
            the reference implementation. What it holds decides, not how it is called.
        target: ``.h5`` or ``.hdf5``, ``.vts``, ``.vtp``, ``.csv`` or ``.npz``.
        name: for ``.vts``, ``.vtp``: the variable drawn as height; default ``train_loss``, or
            without it the first metric.
        log: for ``.vts``, ``.vtp``: height on a log scale.

    Returns:
        One line that says what was written, and what the format could not hold.

    Raises:
        LsweepError: no such source, variable or suffix; the source is damaged (`DamagedFile`); the
            target cannot hold it or cannot be written.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> convert("tests/oracle/filter_2d.surface.h5", folder / "surface.h5")
    'wrote .../surface.h5: lsweep surface, 9 x 9 points (train_loss, train_accuracy)'
    >>> convert(folder / "surface.h5", folder / "surface.vts", name="train_accuracy")
    'wrote .../surface.vts: ParaView StructuredGrid, 9 x 9 points, height train_accuracy'
    """
    place = Path(target)
    suffix = place.suffix.lower()
    if suffix not in SUFFIXES:
        raise LsweepError(f"cannot write {place}: the suffix must be one of {', '.join(SUFFIXES)}")
    if suffix not in (".vts", ".vtp") and (name is not None or log):
        raise LsweepError(f"a metric and a log scale are for .vts and .vtp; {suffix} holds it all")
    if isinstance(source, Surface):
        return f"wrote {place}: {_write(source, place, name, log, theirs=True)}"
    content, ours = _read(Path(source))
    with suppress(OSError, ValueError):  # a target that is not there yet, or cannot be
        if place.samefile(source):
            raise LsweepError(f"{place} is the source: name another target")
    if not isinstance(content, Surface):
        return f"wrote {place}: {_write_directions(content, place)}"
    return f"wrote {place}: {_write(content, place, name, log, theirs=ours)}"


def read(path: str | os.PathLike[str]) -> Surface:
    """Read any file that holds a surface: lsweep's, the reference implementation's, an ``.npz``.

    Returns:
        Values of shape (nz, ny, nx) without the axes that do not exist, float64.

    Raises:
        LsweepError: no such file, it is damaged (`DamagedFile`), or it holds directions.

    >>> read("tests/oracle/filter_1d.surface.h5").shape
    (21,)
    """
    content, _ = _read(Path(path))
    if not isinstance(content, Surface):
        raise LsweepError(f"{path} holds directions, not a surface")
    return content


def _read(path: Path) -> tuple[Surface | Directions, bool]:
    """Return what a file holds, and whether it is an lsweep surface.h5."""
    if first_bytes(path, 2) == b"PK":  # a zip archive
        return npz.load(path), False
    kind = reference.kind(path)
    if kind == "reference directions":
        return reference.read_reference_directions(path), False
    if kind == "reference surface":
        return reference.read_reference_surface(path), False
    return Surface.load(path), True


def _write(surface: Surface, target: Path, name: str | None, log: bool, *, theirs: bool) -> str:
    size = " x ".join(str(len(c)) for c in surface.axes.values()) + " points"
    suffix = target.suffix.lower()
    if suffix in (".vts", ".vtp"):
        form = vtk.structured_grid if suffix == ".vts" else vtk.poly_data
        write_whole(target, form(surface, name, log))
        height = f"height {vtk.height_name(surface, name)}{' (log scale)' if log else ''}"
        title = {".vts": "StructuredGrid", ".vtp": "PolyData"}[suffix]
        return f"ParaView {title}, {size}, {height}"
    if suffix in (".csv", ".npz"):
        write_whole(target, _csv(surface) if suffix == ".csv" else npz.pack(surface))
        return f"{suffix[1:]}, {size} ({', '.join(surface)})"
    if not theirs:
        surface.save(target)
        return f"lsweep surface, {size} ({', '.join(surface)})"
    left_out = reference.write_reference_surface(surface, target)
    kept = ", ".join(n for n in surface if n not in left_out)
    failed = int((surface.status == Status.FAILED).sum())
    return (
        f"surface of the reference implementation, {size} ({kept})"
        + (f"; no place in it for {', '.join(left_out)}" if left_out else "")
        + (f"; failed, so NaN in it: {failed}" if failed else "")
    )


def _write_directions(directions: Directions, target: Path) -> str:
    suffix = target.suffix.lower()
    if suffix == ".npz":
        write_whole(target, npz.pack(directions))
    elif suffix in (".h5", ".hdf5"):
        reference.write_reference_directions(target, directions)
    else:
        raise LsweepError(
            f"directions go to .npz or .h5, not {suffix}; a sweep reads them as they are"
        )
    count = len(directions["x"])
    return (
        f"directions {', '.join(directions)} of the reference implementation, {count} tensors each"
    )


def _csv(surface: Surface) -> bytes:
    """One row per point in C order, x fastest; floats as ``repr`` writes them, so exactly."""
    coordinates = np.meshgrid(*(surface.axes[d] for d in surface.dimensions), indexing="ij")[::-1]
    columns = dict(zip(surface.axes, coordinates, strict=True)) | dict(surface.values)
    words = [s.name.lower() for s in Status]
    status = [words[s] for s in surface.status.ravel().tolist()]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*columns, "status"])
    table.writerows(zip(*(c.ravel().tolist() for c in columns.values()), status, strict=True))
    return text.getvalue().encode()

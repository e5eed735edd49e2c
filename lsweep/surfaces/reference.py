"""The HDF5 files of the reference implementation, tomgoldstein/loss-landscape, read and written.

Directions: groups ``xdirection`` and, for a plane, ``ydirection``, whose datasets "0".."N-1" are
one tensor each, in the order of the model's parameters or of its state dict. No names, no
attributes.

Surface: ``xcoordinates`` (nx,), ``ycoordinates`` (ny,), ``train_loss``, ``train_acc``,
``test_loss``, ``test_acc`` in percent, ``min_eig``, ``max_eig``, ``dir_file``. It declares its
arrays (nx, ny) and fills them in the order of a default ``meshgrid``, y first, so whatever the
declared shape the values are ``ravel().reshape(ny, nx)``. What was not computed is -1 (``min_eig``:
1). The reference's own files carry no checksums, so altered numbers in them cannot be noticed;
those written here carry HDF5's, which every reader checks.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt

from lsweep.errors import DamagedFile, LsweepError
from lsweep.storage.files import write_whole
from lsweep.storage.foreign import numbers, opened, printable, words
from lsweep.surfaces.surface import FloatArray, Status, Surface

Directions = Mapping[str, Sequence[npt.NDArray[Any]]]
Kind = Literal["lsweep surface", "reference surface", "reference directions"]

_PENDING = {"min_eig": 1.0}  # every other quantity: -1
_COMPACT = 60_000  # bytes of data that surely fit into an HDF5 header of at most 64 KiB
_QUANTITY = re.compile(r"(?P<split>\w+)_(?P<metric>loss|acc)|(?P<eig>min_eig|max_eig)", re.ASCII)


def kind(path: str | os.PathLike[str]) -> Kind:
    """Say what an HDF5 file holds.

    Raises:
        DamagedFile: it holds none of these; or, as always when reading, it is cut off or not HDF5.

    >>> kind("tests/oracle/filter_2d.surface.h5")
    'reference surface'
    """
    with opened(path) as f:
        if "lsweep_schema" in f.attrs:
            return "lsweep surface"
        if "xcoordinates" in f:
            return "reference surface"
        if "xdirection" in f or "ydirection" in f:
            return "reference directions"
        held = ", ".join(map(printable, sorted(f)[:5])) or "nothing"
    raise DamagedFile(
        f"{path} is neither a surface (no lsweep_schema, no xcoordinates) nor a direction file of "
        f"the reference implementation (no xdirection); it holds {held}"
    )


def read_reference_surface(path: str | os.PathLike[str]) -> Surface:
    """Read a surface file: ``train_acc`` becomes ``train_accuracy``, -1 becomes pending.

    Other datasets are passed over. LightZero writes the same names with the values transposed and
    nothing that tells; its non-square files come out scrambled, its square ones mirrored.

    Returns:
        float64 values of shape (ny, nx) or (nx,); NaN with status pending where the file says -1,
        status nonfinite where any value of the point is NaN or infinite.

    Raises:
        DamagedFile: it is truncated, not HDF5, or its arrays do not belong together.

    >>> s = read_reference_surface("tests/oracle/filter_2d.surface.h5")
    >>> s.shape, s.metrics, s.minimum("train_loss")[0]
    ((9, 9), ('train_loss', 'train_accuracy'), {'x': 0.0, 'y': 0.0})
    """
    with opened(path) as f:
        axes = {"x": _coordinates(f, "xcoordinates")}
        if "ycoordinates" in f:
            axes["y"] = _coordinates(f, "ycoordinates")
        shape = tuple(len(c) for c in reversed(axes.values()))
        found = {n: m for n in sorted(f, key=_order) if (m := _QUANTITY.fullmatch(n))}
        arrays = {n: _values(f, n, shape) for n in found}
        directions = words(f, "dir_file") if "dir_file" in f else ""
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if not arrays:
        raise DamagedFile(f"{path} has coordinates but no values (train_loss, train_acc, ...)")
    pending = {n: v == _PENDING.get(n, -1.0) for n, v in arrays.items()}
    status = np.where(
        np.logical_or.reduce(list(pending.values())),
        Status.PENDING,
        np.where(np.isfinite(list(arrays.values())).all(axis=0), Status.OK, Status.NONFINITE),
    ).astype(np.uint8)
    source = printable(Path(path).name)
    return Surface(
        axes,
        {_ours(m): np.where(pending[n], np.nan, arrays[n]) for n, m in found.items()},
        status,
        {_ours(m): _attributes(m) for m in found.values()},
        provenance={"reference": {"file": source, "sha256": digest, "dir_file": directions}},
        title=f"loss landscape of the reference implementation, {source}",
    )


def write_reference_surface(surface: Surface, path: str | os.PathLike[str]) -> list[str]:
    """Write losses, accuracies and eigenvalues as a surface file, values (ny, nx) or (nx,).

    Pending is -1 (``min_eig``: 1), which makes the reference implementation compute the point.
    It has no word for failed: such a point is NaN, which it takes as computed.

    Returns:
        The names of the variables that the format has no place for, and that were left out.

    Raises:
        LsweepError: three axes, nothing that the format knows, or the file cannot be written.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/s.h5"
    >>> s = Surface({"x": np.array([0.0, 1.0])}, {"train_accuracy": np.array([90.0, 80.0])})
    >>> write_reference_surface(s, path), read_reference_surface(path)["train_accuracy"]
    ([], array([90., 80.]))
    """
    if len(surface.axes) == 3:
        raise LsweepError(
            "the reference format has no third axis; .vts, .csv and .npz keep all three"
        )
    names = {n: re.sub("_accuracy$", "_acc", n) for n in surface}
    names = {n: r for n, r in names.items() if _QUANTITY.fullmatch(r)}
    if not names:
        raise LsweepError(
            "the reference format holds <split>_loss and <split>_accuracy, this surface only "
            + ", ".join(surface)
        )
    unknown = surface.status == Status.PENDING
    origin = surface.provenance.get("reference")
    directions = printable(str(origin.get("dir_file", ""))) if isinstance(origin, dict) else ""
    with _written(path) as f:
        f["dir_file"] = directions
        for axis, coordinates in surface.axes.items():
            _store(f, f"{axis}coordinates", coordinates, np.nan)
        for ours, theirs in names.items():
            sentinel = _PENDING.get(theirs, -1.0)
            value = np.where(unknown & np.isnan(surface[ours]), sentinel, surface[ours])
            _store(f, theirs, value, sentinel)
    return [n for n in surface if n not in names]


def read_reference_directions(path: str | os.PathLike[str]) -> dict[str, list[npt.NDArray[Any]]]:
    """Read a direction file (PCA files included), in the numeric order of its datasets.

    Returns:
        axis ``x`` and, if there is one, ``y`` -> one array per tensor, shape and dtype as stored.

    Raises:
        DamagedFile: it is truncated or not HDF5; a group is empty or has gaps; the two axes
            differ in shape; a number in it is not finite.

    >>> d = read_reference_directions("tests/oracle/filter_2d.directions.h5")
    >>> list(d), len(d["x"]), d["x"][0].shape
    (['x', 'y'], 9, (8, 1, 3, 3))
    """
    with opened(path) as f:
        directions = {axis: _tensors(f, f"{axis}direction") for axis in _axes_of(f)}
    if "x" not in directions:
        raise DamagedFile(f"{path} has no group xdirection: not a direction file, or half of one")
    shapes = {axis: [t.shape for t in tensors] for axis, tensors in directions.items()}
    if shapes["x"] != shapes.get("y", shapes["x"]):
        raise DamagedFile(f"{path}: xdirection and ydirection differ in number or shape of tensors")
    return directions


def write_reference_directions(
    path: str | os.PathLike[str], directions: Mapping[str, Sequence[npt.ArrayLike]]
) -> None:
    """Write a direction file.

    Args:
        path: the file to make or replace.
        directions: axis ``x``, or ``x`` and ``y`` -> one array per tensor, in the order of the
            model's parameters (or of its state dict); shapes and dtypes are kept.

    Raises:
        LsweepError: other axes, no tensors, something not numeric, or the file cannot be written.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/d.h5"
    >>> write_reference_directions(path, {"x": [np.zeros((2, 3), np.float32), np.int64(4)]})
    >>> read_reference_directions(path)["x"][1]
    array(4)
    """
    if list(directions) not in (["x"], ["x", "y"]) or not all(map(len, directions.values())):
        raise LsweepError(
            f"a direction file holds tensors for x, or for x and y, not {list(directions)}"
        )
    with _written(path) as f:
        for axis, tensors in directions.items():
            group = f.create_group(f"{axis}direction")
            for i, tensor in enumerate(tensors):
                array = np.asarray(tensor)
                if array.dtype.kind not in "fiu":
                    raise LsweepError(f"{axis}direction/{i} is {array.dtype}, not numbers")
                _store(group, str(i), array, np.nan if array.dtype.kind == "f" else 0)


@contextmanager
def _written(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    # In memory first: on a full disk HDF5 loses the error, or the process, when it closes a file.
    image = io.BytesIO()
    # The oldest format whose headers carry checksums; HDF5 1.8 and h5py 2.7 still read it.
    with h5py.File(image, "w", libver=("v108", "v108")) as f:
        yield f
    write_whole(path, image.getvalue())


def _store(group: h5py.Group, name: str, array: npt.NDArray[Any], lost: float) -> None:
    """Write an array under a checksum; what of it gets lost all the same reads as ``lost``."""
    if array.nbytes <= _COMPACT:  # inside of the header, whose checksum then is that of the array
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.COMPACT)
        group.create_dataset(name, data=array, dcpl=layout)
    else:
        group.create_dataset(name, data=array, fletcher32=True, fillvalue=lost)


def _coordinates(f: h5py.File, name: str) -> FloatArray:
    c = numbers(f, name).astype(np.float64)
    if c.ndim != 1 or not c.size or not np.isfinite(c).all():
        raise DamagedFile(f"{f.filename}: {name} is not a row of finite numbers")
    return c


def _values(f: h5py.File, name: str, shape: tuple[int, ...]) -> FloatArray:
    value = numbers(f, name).astype(np.float64)
    if value.shape not in (shape, shape[::-1]):
        raise DamagedFile(
            f"{f.filename}: {name} has shape {value.shape}, the coordinates say {shape[::-1]}"
        )
    return value.ravel().reshape(shape)


def _axes_of(f: h5py.File) -> list[str]:
    return [axis for axis in ("x", "y") if f"{axis}direction" in f]


def _tensors(f: h5py.File, group: str) -> list[npt.NDArray[Any]]:
    if not isinstance(f[group], h5py.Group):
        raise DamagedFile(f"{f.filename}: {group} is not a group of tensors")
    names, expected = set(f[group]), [str(i) for i in range(len(f[group]))]
    if not names:
        raise DamagedFile(f"{f.filename}: {group} is empty")
    if odd := sorted(names.symmetric_difference(expected), key=lambda n: (len(n), n)):
        raise DamagedFile(
            f"{f.filename}: {group} should hold 0 to {len(names) - 1}, gap or extra at "
            + printable(odd[0])
        )
    tensors = [numbers(f, f"{group}/{name}") for name in expected]
    for name, tensor in zip(expected, tensors, strict=True):
        if not np.isfinite(tensor).all():
            raise DamagedFile(f"{f.filename}: {group}/{name} holds NaN or infinite numbers")
    return tensors


def _ours(found: re.Match[str]) -> str:
    return re.sub("_acc$", "_accuracy", found[0])


def _attributes(found: re.Match[str]) -> dict[str, str]:
    if found["eig"]:
        size = {"min_eig": "smallest", "max_eig": "largest"}[found["eig"]]
        return {
            "split": "train",
            "metric": found["eig"],
            "long_name": f"{size} eigenvalue of the Hessian",
            "units": "1",
        }
    metric, units = {"loss": ("loss", "1"), "acc": ("accuracy", "percent")}[found["metric"]]
    split = found["split"]
    return {"split": split, "metric": metric, "long_name": f"{split} {metric}", "units": units}


def _order(name: str) -> tuple[bool, bool, str]:
    return ("eig" in name, not name.startswith("train"), name.replace("_loss", "_0"))

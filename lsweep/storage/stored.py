"""Stored arrays: what cannot be made again bit for bit elsewhere, computed once, kept in the run.

A file is named by what it holds, and the plan names the file: of two who plan at once, neither
overwrites what the other's plan refers to.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from lsweep.errors import DamagedFile, LsweepError
from lsweep.storage.files import publish
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import read, there

Array = npt.NDArray[Any]


def store_arrays(folder: RunFolder, name: str, arrays: Mapping[str, Array]) -> str:
    """Store arrays in a run, synced, before the plan that names them.

    Args:
        folder: the run; it need not hold a plan yet.
        name: what they are, such as the axis of a direction: letters, digits and ``_``.
        arrays: by name; numbers of any kind, which are kept bit for bit.

    Returns:
        Their sha256, for the plan and for `read_arrays`.

    Raises:
        LsweepError: the disk does not take them.
    """
    key = digest_of(arrays)
    image = io.BytesIO()
    with h5py.File(image, "w", libver=("v108", "v108")) as f:
        for n, array in arrays.items():
            f.create_dataset(n.replace("/", "\\"), data=array)
    if not publish(folder.array(name, key), image.getvalue()):
        read_arrays(folder, name, key)  # what is there may be damaged
    return key


def read_arrays(folder: RunFolder, name: str, sha256: str) -> dict[str, Array]:
    """Read what `store_arrays` stored, each bit as it was.

    Args:
        folder: the run.
        name: as it was stored.
        sha256: what `store_arrays` returned.

    Raises:
        LsweepError: it is missing.
        DamagedFile: it is not what was stored.

    >>> import tempfile, pathlib
    >>> run = RunFolder(pathlib.Path(tempfile.mkdtemp()))
    >>> key = store_arrays(run, "x", {"w": np.ones(2)})
    >>> read_arrays(run, "x", key)
    {'w': array([1., 1.])}
    """
    path = folder.array(name, sha256)
    if not there(path):
        raise LsweepError(f"{path} is missing: {_REMEDY}")
    try:
        with h5py.File(io.BytesIO(read(path)), "r") as f:
            arrays = {n.replace("\\", "/"): np.asarray(f[n][()]) for n in f}
        intact = digest_of(arrays) == sha256
    except Exception:  # HDF5 reports damage as almost any exception
        intact = False
    if not intact:
        raise DamagedFile(f"{path} is damaged: {_REMEDY}")
    return arrays


_REMEDY = (
    "it was computed when the run was planned and cannot be made again; restore it, or plan a new "
    "run"
)


def digest_of(arrays: Mapping[str, Array]) -> str:
    """Return the sha256 over names, shapes, types and bytes, sorted by name.

    >>> digest_of({"w": np.zeros(2)}) == digest_of({"w": np.zeros(3)})
    False
    """
    h = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        h.update(f"{name}\0{array.shape}{array.dtype.str}\0".encode())
        h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()

"""A surface or directions as ``.npz``, and back; every array under its own name, every bit kept.

What is not an array (attributes, provenance, the order of names) is JSON in the member ``lsweep``.
Nothing is pickled, and equal contents give equal bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.errors import DamagedFile
from lsweep.storage.foreign import first_bytes
from lsweep.surfaces.reference import Directions
from lsweep.surfaces.surface import Surface, Trajectory

_ABOUT = "lsweep"
_FIXED = {"offset": "offsets", "residual": "residual", "in_plane": "in_plane"}


def pack(content: Surface | Directions) -> bytes:
    """Return an ``.npz``: ``x``, ``y``, every variable, ``status``; or ``xdirection/0`` and so on.

    >>> s = Surface({"x": np.array([0.0, 1.0])}, {"train_loss": np.array([2.0, 0.1])})
    >>> with np.load(io.BytesIO(pack(s))) as z:
    ...     z.files, z["train_loss"]
    (['lsweep', 'x', 'train_loss', 'status'], array([2. , 0.1]))
    """
    arrays: dict[str, npt.NDArray[Any]]
    if not isinstance(content, Surface):
        arrays = {f"{a}direction/{i}": t for a, ts in content.items() for i, t in enumerate(ts)}
        return _archive(arrays, {"directions": {a: len(ts) for a, ts in content.items()}})
    arrays = {**content.axes, **content.values, "status": content.status}
    about: dict[str, Any] = {
        "axes": list(content.axes),
        "values": list(content.values),
        "attributes": {n: dict(a) for n, a in content.attributes.items()},
        "provenance": dict(content.provenance),
        "title": content.title,
        "history": content.history,
    }
    if (t := content.trajectory) is not None:
        about["trajectory"] = {"labels": t.labels, "values": list(t.values)}
        arrays |= {f"trajectory/{n}": getattr(t, a) for n, a in _FIXED.items()}
        arrays |= {f"trajectory/{n}": v for n, v in t.values.items()}
    return _archive(arrays, about)


def load(path: Path) -> Surface | Directions:
    """Read what `pack` made; zip's checksums cover every array.

    Raises:
        DamagedFile: it is truncated, altered or not of `pack`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "d.npz"
    >>> _ = path.write_bytes(pack({"x": [np.zeros(3), np.ones(2)]}))
    >>> load(path)
    {'x': [array([0., 0., 0.]), array([1., 1.])]}
    """
    first_bytes(path, 1)
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = {n: z[n] for n in z.files}
        about = json.loads(str(arrays.pop(_ABOUT)))
        if "directions" in about:
            counts = about["directions"].items()
            return {a: [arrays[f"{a}direction/{i}"] for i in range(n)] for a, n in counts}
        return _surface(arrays, about)
    except Exception as e:  # zip, zlib, numpy and json each report damage in their own way
        lines = (f"no {e} in it" if isinstance(e, KeyError) else str(e)).splitlines()
        reason = lines[0] if lines else type(e).__name__
        raise DamagedFile(f"{path} is damaged or not an .npz of lsweep: {reason}") from e


def _archive(arrays: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]) -> bytes:
    """Like `numpy.savez_compressed`, without the time of day and with any name allowed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name, array in {_ABOUT: np.array(json.dumps(about)), **arrays}.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
            z.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _surface(arrays: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]) -> Surface:
    trajectory = None
    if "trajectory" in about:
        trajectory = Trajectory(
            **{a: arrays[f"trajectory/{n}"] for n, a in _FIXED.items()},
            values={n: arrays[f"trajectory/{n}"] for n in about["trajectory"]["values"]},
            labels=tuple(about["trajectory"]["labels"]),
        )
    surface = Surface(
        {n: arrays[n] for n in about["axes"]},
        {n: arrays[n] for n in about["values"]},
        arrays["status"],
        trajectory=trajectory,
    )
    rest = ("attributes", "provenance", "title", "history")
    return dataclasses.replace(surface, **{n: about[n] for n in rest})

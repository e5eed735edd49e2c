"""Where two surfaces differ: bit for bit at evaluated points, beyond rounding at interpolated ones.

The interpolant is made by products of matrices, whose last bits depend on how many threads, and
which kind of CPU, compute them: a merge on another node may round otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.surfaces.surface import Status, Surface

ROUNDING = 1e-4  # of an interpolated value, and of the largest: errors' last digits are lost first


def difference(one: Surface, other: Surface) -> str:
    """Return the name of an axis or variable that is not the same, or "".

    >>> a, b = (Surface({"x": np.arange(2.0)}, {"a": np.array([1.0, v])}) for v in (2.0, 2.00001))
    >>> difference(a, a), difference(a, b)
    ('', 'a')
    >>> a.status[1] = b.status[1] = Status.INTERPOLATED
    >>> difference(a, b)
    ''
    """
    a, b = _arrays(one), _arrays(other)
    filled = one.status == Status.INTERPOLATED
    for name in sorted({*a, *b}):
        if name not in a or name not in b or a[name].shape != b[name].shape:
            return name
        if a[name].tobytes() == b[name].tobytes():
            continue
        if name not in one.values or not _same_but_rounded(a[name], b[name], filled):
            return name
    return ""


def _same_but_rounded(a: npt.NDArray[Any], b: npt.NDArray[Any], filled: npt.NDArray[Any]) -> bool:
    if a[~filled].tobytes() != b[~filled].tobytes():
        return False
    largest = np.max(np.abs(a[filled]), initial=0.0, where=np.isfinite(a[filled]))
    return np.allclose(a[filled], b[filled], ROUNDING, ROUNDING * largest, equal_nan=True)


def _arrays(surface: Surface) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {**surface.axes, **surface.values}
    arrays["status"] = surface.status
    if surface.trajectory is not None:
        t = surface.trajectory
        found = {"offset": t.offsets, "residual": t.residual, "in_plane": t.in_plane}
        arrays |= {f"trajectory {n}": v for n, v in {**found, **t.values}.items()}
    return arrays

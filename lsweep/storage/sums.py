"""Mergeable sums: what is kept of a variable at a point, and its mean and error.

Value m = Σwv/Σw. Standard error over samples: sqrt(Σw²(v-m)²)/Σw · sqrt(n/(n-1)) with the effective
n = (Σw)²/Σw²; for equal weights this is s/√n.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
SUMS = ("w", "ww", "wv", "wwv", "wwvv", "wd", "wwd", "wwdd")
"""The sums over samples kept of a variable: w weight, v value, d = v - value at the centre."""
W, WW, WV, WWV, WWVV, WD, WWD, WWDD = range(8)


def means(sums: FloatArray) -> FloatArray:
    """Return Σwv/Σw from (..., 8) sums.

    >>> means(np.array([2.0, 2.0, 6.0, 0, 0, 0, 0, 0]))
    np.float64(3.0)
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 2] / sums[..., 0])[()]


def standard_error(w: Any, ww: Any, wv: Any, wwv: Any, wwvv: Any) -> FloatArray:
    """Return the standard error of Σwv/Σw over samples; NaN for fewer than two.

    >>> v = np.array([1.0, 2.0, 4.0])
    >>> e = standard_error(3.0, 3.0, v.sum(), v.sum(), (v * v).sum())
    >>> bool(np.isclose(e, v.std(ddof=1) / np.sqrt(3)))
    True
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = wv / w
        square = np.maximum(wwvv - 2 * mean * wwv + mean * mean * ww, 0.0)
        n = w * w / ww
        error = np.where(n > 1.0000001, np.sqrt(square * n / (n - 1)) / w, np.nan)
    return np.asarray(error, dtype=np.float64)

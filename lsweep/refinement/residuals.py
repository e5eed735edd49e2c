"""Residuals: what interpolated points miss, from a few samples, without bias and with its error.

Σ_k c_k(x)·L(x_k), linear in the losses of evaluated points, is so sample by sample too: on sample i
the residual r_i(x) = l_i(x) - Σ_k c_k(x)·l_i(x_k) has the mean L(x) - Σ_k c_k(x)·L(x_k) over all
samples. Its average over m samples drawn at random is an unbiased estimate of that error, and
varies little, for what interpolates a surface well interpolates its samples too (a control variate;
Owen, Monte Carlo theory, methods and examples, 2013, section 8.9). An interpolant of another kind,
of ln L say, differs from the linear one by a number that is known: see `Residuals.of_another`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Residuals:
    """What was found at audited points.

    Attributes:
        mean: (A,) unbiased estimate of L(x) - L̂(x).
        se: (A,) its standard error over samples.
        square: unbiased estimate of the mean over points of (L - L̂)²; its own noise may make it
            negative where the interpolant is as good as exact.
    """

    mean: FloatArray
    se: FloatArray
    square: float

    @property
    def typical(self) -> float:
        """The root mean square error over the audited points; 0 where none can be told."""
        return float(np.sqrt(max(self.square, 0.0)))

    def of_another(self, interpolated: FloatArray, linear: FloatArray) -> Residuals:
        """Return the residuals of another interpolant, the linear one serving to estimate them.

        L - L̂ = (Σ c_k·L(x_k) - L̂) + (L - Σ c_k·L(x_k)): the first is known, the second is here.

        Args:
            interpolated: (A,) L̂ of the other interpolant.
            linear: (A,) Σ c_k·L(x_k), over all samples.
        """
        mean = self.mean + linear - interpolated
        return Residuals(mean, self.se, float(np.mean(mean**2 - self.se**2)))

    def within(self, stated: FloatArray, z: float = 1.96) -> npt.NDArray[np.bool_]:
        """Say of each point whether its stated error is borne out: |mean| ≤ stated + z·se."""
        return np.asarray(np.abs(self.mean) <= stated + z * self.se)


def residuals(
    points: npt.ArrayLike, nodes: npt.ArrayLike, coefficients: npt.ArrayLike, of: int | None = None
) -> Residuals:
    """Return the residuals of interpolated points from the losses of a few samples.

    r_i = l_i(x) - Σ_k c_k·l_i(x_k); mean r̄ ± s/√m · √(1 - m/N).

    Args:
        points: (A, m) loss of each sample at each audited point.
        nodes: (K, m) loss of the same samples at each evaluated point.
        coefficients: (A, K) c_k of each audited point; each row adds up to 1 where the
            interpolant keeps constants.
        of: N, when the m samples were drawn without replacement from so many.

    Returns:
        The residuals of the A points.

    Raises:
        ValueError: fewer than two samples, or shapes that do not fit.

    >>> ends = np.array([[0.0, 2.0, 4.0], [2.0, 4.0, 7.0]])
    >>> r = residuals([[1.0, 3.0, 5.5]], ends, [[0.5, 0.5]])     # linear in between: no residual
    >>> float(r.mean[0]), float(r.se[0]), r.typical
    (0.0, 0.0, 0.0)
    """
    at, given, c = (np.asarray(a, dtype=np.float64) for a in (points, nodes, coefficients))
    m = at.shape[-1]
    if at.ndim != 2 or given.ndim != 2 or c.shape != (len(at), len(given)) or given.shape[1] != m:
        raise ValueError(f"points {at.shape}, nodes {given.shape}, coefficients {c.shape}")
    if m < 2:
        raise ValueError(f"{m} samples have no standard error")
    found = at - c @ given
    mean = found.mean(axis=1)
    left = 1.0 if of is None else max(0.0, 1.0 - m / of)
    se = found.std(axis=1, ddof=1) * np.sqrt(left / m)
    return Residuals(mean, se, float(np.mean(mean**2 - se**2)))

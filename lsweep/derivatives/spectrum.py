"""The spectral density of the Hessian from stochastic Lanczos quadrature, without the network.

For a random unit vector v, vᵀf(H)v is on average tr f(H)/P, and m steps of Lanczos from v give it
as Σ w_i f(θ_i), exactly for polynomials up to degree 2m-1. Arrays are (K, m): K start vectors, each
with its Ritz values θ and weights w, padded with weight 0.

B. Ghorbani, S. Krishnan, Y. Xiao, *An Investigation into Neural Net Optimization via Hessian
Eigenvalue Density*, ICML 2019; S. Ubaru, J. Chen, Y. Saad, SIAM J. Matrix Anal. 2017.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
WIDTH = 0.01  # of the range of Ritz values: the standard deviation of each Gaussian
NEGATIVE = 0.01  # of the largest |θ|: what counts as negative lies below minus that


class Estimate(NamedTuple):
    """A mean over start vectors, and its standard error; NaN for a single one."""

    value: FloatArray
    se: FloatArray


def over_starts(values: FloatArray) -> Estimate:
    """Return mean and standard error over the first dimension, the start vectors.

    >>> over_starts(np.array([1.0, 2.0, 3.0]))
    Estimate(value=np.float64(2.0), se=np.float64(0.577...))
    """
    k = len(values)
    spread = values.std(axis=0, ddof=1) if k > 1 else np.full(values.shape[1:], np.nan)[()]
    return Estimate(values.mean(axis=0), spread / np.sqrt(k))


def _known(weights: FloatArray, values: FloatArray) -> FloatArray:
    """Return values by start vector, NaN for one that has no weight: its Hessian was not finite."""
    there = weights.sum(axis=1) > 0
    return np.where(there.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)


def width(ritz: FloatArray, weights: FloatArray) -> float:
    """Return the default width of a Gaussian: 1% of the range of the Ritz values.

    >>> width(np.array([[0.0, 10.0]]), np.array([[0.5, 0.5]]))
    0.1
    """
    there = ritz[weights > 0]
    extent = float(there.max() - there.min()) if there.size else 0.0
    return WIDTH * (extent or float(np.abs(there).max(initial=0.0)) or 1.0)


def grid(ritz: FloatArray, weights: FloatArray, sigma: float, count: int = 0) -> FloatArray:
    """Return where to draw a density: five widths beyond the Ritz values, four points per width."""
    there = ritz[weights > 0] if (weights > 0).any() else np.zeros(1)
    low, high = there.min() - 5 * sigma, there.max() + 5 * sigma
    return np.linspace(low, high, count or int(np.ceil(4 * (high - low) / sigma)) + 1)


def density(ritz: FloatArray, weights: FloatArray, at: FloatArray, sigma: float) -> Estimate:
    """Return the spectral density φ(t) = Σ w_i N(t; θ_i, σ²), which integrates to 1.

    Args:
        ritz: (K, m) Ritz values θ.
        weights: (K, m) their weights w; each row adds up to 1.
        at: (T,) eigenvalues t.
        sigma: σ, the Gaussians' standard deviation, in units of t; nothing narrower shows.

    Returns:
        (T,) mean over start vectors and its standard error, in units of 1/t.

    >>> t = np.linspace(-1, 3, 401)
    >>> phi = density(np.array([[0.0, 2.0]]), np.array([[0.9, 0.1]]), t, 0.05).value
    >>> round(float(np.trapezoid(phi, t)), 6), round(float(np.trapezoid(phi[t > 1], t[t > 1])), 3)
    (1.0, 0.1)
    """
    out = np.zeros((len(ritz), len(at)))
    for k, i in zip(*np.nonzero(weights > 0), strict=True):  # memory for one Gaussian at a time
        out[k] += weights[k, i] * np.exp(-0.5 * ((at - ritz[k, i]) / sigma) ** 2)
    return over_starts(_known(weights, out / (sigma * np.sqrt(2 * np.pi))))


def negative_mass(ritz: FloatArray, weights: FloatArray, tau: float | None = None) -> Estimate:
    """Return the share of eigenvalues below -τ, Σ w_i [θ_i < -τ].

    Args:
        ritz: (K, m) Ritz values.
        weights: (K, m) their weights.
        tau: what counts as zero; by default 1% of the largest |θ| over all start vectors, as the
            many eigenvalues at 0 scatter to both sides.

    >>> negative_mass(np.array([[-1.0, 0.0, 3.0]]), np.array([[0.25, 0.5, 0.25]])).value
    np.float64(0.25)
    """
    limit = threshold(ritz, weights) if tau is None else tau
    return over_starts(_known(weights, np.where(ritz < -limit, weights, 0.0).sum(axis=1)))


def threshold(ritz: FloatArray, weights: FloatArray) -> float:
    """Return the default τ of `negative_mass`: 1% of the largest |θ|.

    >>> threshold(np.array([[-1.0, 3.0]]), np.array([[0.5, 0.5]]))
    0.03
    """
    return NEGATIVE * float(np.abs(ritz[weights > 0]).max(initial=0.0))


def moment(ritz: FloatArray, weights: FloatArray, order: int = 1) -> Estimate:
    """Return the mean of λ**order over all eigenvalues; P times the first is the trace.

    >>> moment(np.array([[1.0, 3.0]]), np.array([[0.5, 0.5]])).value
    np.float64(2.0)
    >>> moment(np.zeros((1, 2)), np.zeros((1, 2))).value  # no Ritz value was finite
    np.float64(nan)
    """
    return over_starts(_known(weights, (weights * ritz**order).sum(axis=1)))

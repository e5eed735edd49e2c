"""The interpolant: cubic radial functions with a linear tail, and how far it is off where.

With nodes x_i and values f_i, T̂(x) = Σ c_i |x − x_i|³ + a + b·x, where A [c; a; b] = [f; 0] and
A = [[Φ, P], [Pᵀ, 0]], Φ_ij = |x_i − x_j|³, P = [1, x]. That is kriging with the generalised
covariance r³ (Wendland, Scattered Data Approximation, 2005, chapters 8 and 11), on a line the
natural cubic spline. Its standard deviation for a field of unit roughness,

    S(x)² = −[φ(x); 1; x]ᵀ A⁻¹ [φ(x); 1; x],   φ_i(x) = |x − x_i|³,

is 0 at the nodes and largest in the middle of what they leave open. Leaving node i out predicts it
with the error e_i = c_i / (A⁻¹)_ii and the deviation s_i = (A⁻¹)_ii^-½ (Rippa, Adv. Comput. Math.
11, 1999), so that one inverse tells the roughness around every node, and the **scale** of the
error is

    scale(x) = ρ(x) · S(x),   ρ(x) = Σ w_i(x) ρ_i,   ρ_i = |e_i| / s_i,

w the weights of the nearest nodes. It is the mean of the |error|, and does not know its sign: over
it the true error is spread as the absolute value of a normal variable is, with tails a little
heavier (benchmarks/honesty.md).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NEAR = 16
"""Nodes that tell the roughness of a place."""
COMMON = 0.1
"""The share of the median roughness of all nodes in the roughness of any place."""
BLOCK = 1 << 21
"""Entries of the largest matrix made while predicting (16 MiB)."""


class Interpolant:
    """T̂ through scattered nodes in any number of axes, and the scale of its error.

    Attributes:
        missed: (n,) |e_i|, how far all the other nodes miss each node.

    >>> line = Interpolant(np.array([[0.0], [0.25], [0.5], [1.0]]), np.array([1.0, 2.0, 3.0, 5.0]))
    >>> value, scale = line.predict(np.array([[0.25], [0.75]]))
    >>> value.round(9), scale.round(9)  # a straight line has no roughness
    (array([2., 4.]), array([0., 0.]))
    """

    def __init__(self, nodes: FloatArray, values: FloatArray) -> None:
        """Fit.

        Args:
            nodes: (n, A) distinct positions; axes of about unit length.
            values: (n,) finite values.
        """
        self._nodes = nodes
        n, axes = nodes.shape
        matrix = np.zeros((n + axes + 1, n + axes + 1))
        matrix[:n, :n] = _cubes(_squares(nodes, nodes))
        matrix[:n, n] = matrix[n, :n] = 1.0
        matrix[:n, n + 1 :] = nodes
        matrix[n + 1 :, :n] = nodes.T
        try:
            inverse = np.linalg.inv(matrix)
        except np.linalg.LinAlgError:  # all nodes on one line of a plane: the least of all tails
            inverse = np.linalg.pinv(matrix)
        self._inverse: FloatArray = (inverse + inverse.T) / 2
        self._offset = float(np.mean(values))  # removed first, so that rounding follows the relief
        self._weights = self._inverse[:, :n] @ (values - self._offset)
        diagonal = np.maximum(np.diag(self._inverse)[:n], np.finfo(float).tiny)
        self._deviation = diagonal**-0.5
        self.missed: FloatArray = np.abs(self._weights[:n] / diagonal)
        self._rough = self.missed / self._deviation
        self._median = float(np.median(self._rough))

    def predict(self, points: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return T̂ and the scale of its error.

        Args:
            points: (m, A) positions.

        Returns:
            (m,) values and (m,) scales, in the units of the values; 0 at the nodes.
        """
        value, scale = np.empty(len(points)), np.empty(len(points))
        step = max(1, BLOCK // len(self._inverse))
        for start in range(0, len(points), step):
            here = slice(start, start + step)
            squares = _squares(points[here], self._nodes)
            b = self._functions(points[here], squares)
            value[here] = b @ self._weights + self._offset
            variance = -np.einsum("ij,ij->i", b @ self._inverse, b)
            scale[here] = self._roughness(squares) * np.sqrt(np.maximum(variance, 0.0))
        return value, scale

    def coefficients(self, points: FloatArray) -> FloatArray:
        """Return (m, n) c with T̂ = Σ c_k f_k whatever the values f; each row adds up to 1.

        Args:
            points: (m, A) positions.

        >>> line = Interpolant(np.array([[0.0], [1.0]]), np.zeros(2))
        >>> line.coefficients(np.array([[0.25]])).round(9)
        array([[0.75, 0.25]])
        """
        squares = _squares(points, self._nodes)
        n = len(self._nodes)
        return np.asarray(self._functions(points, squares) @ self._inverse[:, :n])

    def left_out(self) -> FloatArray:
        """Return (n,) |error| over scale with which all the other nodes predict each node."""
        ratio = np.empty(len(self._nodes))
        step = max(1, BLOCK // len(self._inverse))
        for start in range(0, len(ratio), step):
            here = np.arange(start, min(start + step, len(ratio)))
            squares = _squares(self._nodes[here], self._nodes)
            squares[np.arange(len(here)), here] = np.inf  # its own error tells nobody its roughness
            scale = self._roughness(squares) * self._deviation[here]
            ratio[here] = self.missed[here] / np.maximum(scale, np.finfo(float).tiny)
        return ratio

    def sequence(self, points: FloatArray, limit: float, most: int) -> tuple[IntArray, int]:
        """Return which points to add as nodes, one after the other.

        The next is always the one of largest scale. How S falls does not depend on what will be
        found: after one more node c the errors' covariance is C(x, y) − C(x, c) C(c, y) / C(c, c).

        Args:
            points: (m, A) positions to choose from.
            limit: a scale.
            most: how many at most.

        Returns:
            (k,) positions in ``points``, and how many of these it takes until no scale of a point
            is above the limit; k where ``most`` do not suffice.
        """
        squares = _squares(points, self._nodes)
        b = self._functions(points, squares)
        rough = self._roughness(squares) / limit
        reduced = b @ self._inverse
        variance = np.maximum(-np.einsum("ij,ij->i", reduced, b), 0.0)
        least = 1e-9 * variance
        found = np.empty((min(most, len(points)), len(points)))  # rows of a Cholesky factor
        chosen: list[int] = []
        needed = None
        for k in range(len(found)):
            # Rounded, so that equals stay equal and the first is taken on every machine.
            scale = np.round(rough * np.sqrt(variance), 6)
            c = int(np.argmax(scale))
            if scale[c] <= 1.0 and needed is None:
                needed = k
            if scale[c] == 0.0:
                break
            chosen.append(c)
            column = _cubes(_squares(points, points[[c]])[:, 0]) - reduced @ b[c]
            column -= found[:k, c] @ found[:k]
            found[k] = column / np.sqrt(variance[c])
            variance = variance - found[k] ** 2
            variance[variance <= least] = 0.0
        return np.array(chosen, dtype=np.int64), len(chosen) if needed is None else needed

    def _roughness(self, squares: FloatArray) -> FloatArray:
        """Return ρ (m,) where the squared distances to the nodes are (m, n)."""
        count = min(NEAR, squares.shape[1])
        near = np.argpartition(squares, count - 1, axis=1)[:, :count]
        d = np.take_along_axis(squares, near, axis=1)
        finite = np.isfinite(d)
        farthest = np.max(d, axis=1, keepdims=True, where=finite, initial=0.0)
        d = np.where(finite, d, farthest)
        # They fall to 0 at the last of them, so that which of two equals that is does not matter.
        weight = 1.0 / (d + 0.1 * farthest) - 1.0 / (1.1 * farthest)
        weight /= weight.sum(axis=1, keepdims=True)
        local = np.einsum("ij,ij->i", weight, self._rough[near])
        return np.asarray((1.0 - COMMON) * local + COMMON * self._median)

    def _functions(self, points: FloatArray, squares: FloatArray) -> FloatArray:
        return np.hstack([_cubes(squares), np.ones((len(points), 1)), points])


def _squares(a: FloatArray, b: FloatArray) -> FloatArray:
    square = np.zeros((len(a), len(b)))
    for k in range(a.shape[1]):
        square += np.subtract.outer(a[:, k], b[:, k]) ** 2
    return square


def _cubes(squares: FloatArray) -> FloatArray:
    return np.asarray(squares * np.sqrt(squares))

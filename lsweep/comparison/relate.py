"""Relations: how the order of networks by a measure goes with their order by another number.

Every statistic here is a weighted sum of sign(a_i - a_j)·sign(b_i - b_j) over pairs of networks, so
that one set of permuted b gives the null distribution of all of them at once. A τ says how often
two networks stand in the same order; it says nothing of why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

PERMUTATIONS = 2000
FEWEST = 8  # networks; below it an interval spans almost everything
INSIDE = 0.95
BLOCK = 2**24  # signs held at once as float64
MOST = 2**31  # signs held as bytes
NEIGHBOURS = 3  # networks of about the same held number
TINY = 1e-12  # two sums of the same signs in another order are one value


@dataclass(frozen=True)
class Tau:
    """A τ, a ψ or Ψ beside what it would be by chance.

    Attributes:
        value: from -1 to 1.
        low: 2.5 % quantile of it when b is permuted over the networks: the null interval's end.
        high: 97.5 % quantile.
        p: share of permutations at least as far from 0 (of a partial τ: from their mean), itself
            counted; two-sided.
        pairs: of networks that it compares.

    >>> Tau(0.5, -0.2, 0.2, 0.001, 45).text
    '+0.50 [-0.20, +0.20] p=0.001'
    """

    value: float
    low: float
    high: float
    p: float
    pairs: int

    @property
    def text(self) -> str:
        """Value, null interval and p for people."""
        if not math.isfinite(self.value):
            return "undefined"
        p = f"{self.p:.3f}" if self.p >= 0.001 else f"{self.p:.1g}"
        value, low, high = (round(v, 2) + 0.0 for v in (self.value, self.low, self.high))
        return f"{value:+.2f} [{low:+.2f}, {high:+.2f}] p={p}"


@dataclass(frozen=True)
class Relation:
    """How one measure's order goes with the other number's.

    Attributes:
        networks: how many had both.
        tau: Kendall's τ-b over all pairs.
        axes: hyper-parameter -> ψ, τ over pairs that differ in it alone.
        psi: Ψ, the mean of the ψ; None without any axis.
        worst: the axis where ψ agrees least with Ψ's sign, or opposes it most; "" without any.
    """

    networks: int
    tau: Tau
    axes: Mapping[str, Tau] = field(default_factory=dict)
    psi: Tau | None = None
    worst: str = ""


@dataclass(frozen=True)
class Permuted:
    """The signs of all pairs, of b as it is and of b permuted; made once for all measures.

    Attributes:
        first: (P,) int64, one network of each pair.
        second: (P,) int64, the other one.
        signs: (P,) float64, sign(b_i - b_j).
        shuffled: (N, P) int8, the same of each permutation.
    """

    first: IntArray
    second: IntArray
    signs: FloatArray
    shuffled: npt.NDArray[np.int8]

    @classmethod
    def of(
        cls,
        b: FloatArray,
        permutations: int = PERMUTATIONS,
        seed: int = 0,
        strata: Sequence[IntArray] = (),
    ) -> Permuted:
        """Permute ``b`` by Philox, keyed by ``seed`` alone.

        Args:
            b: (n,) finite values.
            permutations: how many.
            seed: of the permutations.
            strata: groups of indices within which it is permuted; by default all are one group.

        Raises:
            LsweepError: the signs of all permutations would take more than 2 GiB.
        """
        pairs = len(b) * (len(b) - 1) // 2
        if permutations * pairs > MOST:
            raise LsweepError(
                f"{permutations} permutations of {len(b)} networks, {pairs} pairs, need "
                f"{permutations * pairs / 1e9:.3g} GB: at most --permutations {MOST // pairs}"
            )
        groups = strata or (np.arange(len(b)),)
        first, second = (i.astype(np.int64) for i in np.triu_indices(len(b), 1))
        random = np.random.Generator(np.random.Philox(key=seed))
        shuffled = np.empty((permutations, len(first)), np.int8)
        for row in shuffled:
            mixed = b.copy()
            for group in groups:
                mixed[group] = b[random.permutation(group)]
            row[:] = np.sign(mixed[first] - mixed[second])
        return cls(first, second, np.sign(b[first] - b[second]), shuffled)

    def signs_of(self, a: FloatArray) -> FloatArray:
        """Return sign(a_i - a_j) of every pair, (P,) float64."""
        return np.sign(a[self.first] - a[self.second])

    def null(self, weights: FloatArray) -> FloatArray:
        """Return Σ weight·sign(b_i - b_j) of every permutation.

        Args:
            weights: (P, S), a column for each statistic.

        Returns:
            (N, S) float64.
        """
        step = max(1, BLOCK // max(1, len(self.first)))
        blocks = [
            self.shuffled[i : i + step].astype(np.float64) @ weights
            for i in range(0, len(self.shuffled), step)
        ]
        return np.concatenate(blocks)


def kendall(a: FloatArray, b: FloatArray) -> float:
    r"""Return Kendall's τ-b of two numbers of the same networks; NaN where one of them is constant.

    τ_b = Σ s_ij t_ij / √(Σ s_ij² · Σ t_ij²), s_ij = sign(a_i - a_j), t_ij = sign(b_i - b_j), over
    pairs i < j (Kendall 1945). Without ties it is concordant minus discordant pairs over all.

    >>> kendall(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
    0.3333333333333333
    """
    first, second = np.triu_indices(len(a), 1)
    s, t = np.sign(a[first] - a[second]), np.sign(b[first] - b[second])
    size = math.sqrt(float(s @ s) * float(t @ t))
    return float(s @ t) / size if size else math.nan


def partial(xy: float, xz: float, yz: float) -> float:
    """Return the partial τ of x and y with z held: (τ_xy - τ_xz τ_yz) / √((1-τ_xz²)(1-τ_yz²)).

    Kendall (1942). NaN where z orders the networks exactly as x or y does.

    >>> round(partial(0.6, 0.6, 0.8), 12)
    0.25
    """
    return float(_partials(np.array(xy), xz, np.array(yz)))


def _partials(xy: FloatArray, xz: float, yz: FloatArray) -> FloatArray:
    left = (1 - xz**2) * (1 - yz**2)
    known = left > TINY
    return np.where(known, (xy - xz * yz) / np.sqrt(np.where(known, left, 1.0)), math.nan)


def axis_pairs(
    settings: Sequence[Mapping[str, Any]], axes: Sequence[str], held: Sequence[str] = ()
) -> dict[str, FloatArray]:
    """Return for each axis the weight of every pair of networks in ψ.

    ψ_i is the mean, over settings of all other hyper-parameters, of the mean of
    sign(a_i - a_j)·sign(b_i - b_j) over pairs that differ in axis i alone (Jiang et al. 2020,
    arXiv:1912.02178, section 2). Pairs that tie count as 0, as there.

    Args:
        settings: of each network.
        axes: hyper-parameters.
        held: what else must be equal in a pair, such as the seed of a training.

    Returns:
        axis -> (P,) float64 in the order of ``np.triu_indices``; axes without a pair are left out.

    >>> settings = [{"width": w, "wd": d} for w in (1, 2) for d in (0, 1)]
    >>> {k: v.tolist() for k, v in axis_pairs(settings, ["wd"], ["width"]).items()}
    {'wd': [0.5, 0.0, 0.0, 0.0, 0.0, 0.5]}
    """
    every = [*axes, *held]
    codes = np.array(
        [[_code(s.get(key)) for key in every] for s in settings], dtype=object
    ).reshape(len(settings), len(every))
    first, second = np.triu_indices(len(settings), 1)
    out = {}
    for column, axis in enumerate(axes):
        others = [tuple(np.delete(row, column)) for row in codes]
        names = {key: i for i, key in enumerate(dict.fromkeys(others))}
        group = np.array([names[key] for key in others], dtype=np.int64)
        here = (group[first] == group[second]) & (codes[first, column] != codes[second, column])
        if here.any():
            in_group = np.bincount(group[first][here], minlength=len(names))
            weight = np.zeros(len(first))
            used = in_group[group[first][here]]
            weight[here] = 1.0 / used / np.count_nonzero(in_group)
            out[axis] = weight
    return out


def _code(value: Any) -> str:
    """Return what tells settings apart: 0 and 0.0 are one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(float(value) if number else value)


def relate(a: FloatArray, permuted: Permuted, axes: Mapping[str, FloatArray]) -> Relation:
    """Return all that is said of how ``a`` goes with what was permuted.

    Args:
        a: (n,) finite values of a measure.
        permuted: of the other number, of the same networks.
        axes: weights of pairs, by `axis_pairs` of the same networks.

    >>> b = np.arange(6.0)
    >>> relate(b**2, Permuted.of(b), {}).tau.value
    1.0
    """
    s = permuted.signs_of(a)
    size = math.sqrt(float(s @ s) * float(permuted.signs @ permuted.signs))
    if not size:  # one of both is the same in all networks: it has no order
        s = s * math.nan
    columns = [s, *(w * s for w in axes.values())]
    if axes:
        columns.append(np.mean(columns[1:], axis=0))
    weights = np.stack(columns, axis=1)
    values, null = permuted.signs @ weights, permuted.null(weights)
    for array in (values[:1], null[:, 0]):  # divided last: sums of signs are exact
        array /= size
    pairs = [len(s), *(int(np.count_nonzero(w)) for w in axes.values())]
    pairs.append(sum(pairs[1:]))
    found = [_judged(float(v), null[:, i], pairs[i]) for i, v in enumerate(values)]
    if not axes:
        return Relation(len(a), found[0])
    by_axis, psi = dict(zip(axes, found[1:-1], strict=True)), found[-1]
    side = math.copysign(1.0, psi.value)
    worst = min(by_axis, key=lambda k: side * by_axis[k].value)
    return Relation(len(a), found[0], by_axis, psi, worst)


def strata_of(z: FloatArray) -> list[IntArray]:
    """Return networks among which the held number is the same, or about the same.

    Those of one value where values repeat; else neighbours in its order, `NEIGHBOURS` at a time.

    >>> [g.tolist() for g in strata_of(np.array([0.0, 1.0, 0.0, 1.0]))]
    [[0, 2], [1, 3]]
    """
    values = np.unique(z)
    if 2 * len(values) <= len(z):
        return [np.flatnonzero(z == v).astype(np.int64) for v in values]
    order = np.argsort(z, kind="stable").astype(np.int64)
    return np.array_split(order, max(1, len(z) // NEIGHBOURS))


def relate_partially(a: FloatArray, z: FloatArray, permuted: Permuted) -> Tau:
    """Return the partial τ of ``a`` and ``b``, which was permuted, with ``z`` held.

    Its null is to permute b among networks of about the same z (`strata_of`), which keeps how b
    follows z: a partial τ is not 0 where a and b follow z alone, so that is what it is beside.

    Args:
        a: (n,) finite values of a measure.
        z: (n,) what is held.
        permuted: b within ``strata_of(z)``.

    >>> a, b, z = np.arange(8.0), np.arange(8.0) ** 2, np.array([1.0, 0.0] * 4)
    >>> relate_partially(a, z, Permuted.of(b, 100, strata=strata_of(z))).value
    1.0
    """
    signs = np.stack([permuted.signs_of(v) for v in (a, z)], axis=1)
    t = float(permuted.signs @ permuted.signs)
    sizes = np.sqrt((signs**2).sum(axis=0) * t)
    if not sizes.all():
        return Tau(math.nan, math.nan, math.nan, math.nan, len(permuted.first))
    xz = kendall(a, z)
    ab, zb = permuted.signs @ signs / sizes
    null = permuted.null(signs) / sizes
    many = _partials(null[:, 0], xz, null[:, 1])
    known = many[np.isfinite(many)]
    return _judged(partial(float(ab), xz, float(zb)), known, len(permuted.first), centred=False)


def _judged(value: float, null: FloatArray, pairs: int, centred: bool = True) -> Tau:
    if not math.isfinite(value) or not len(null):
        return Tau(math.nan, math.nan, math.nan, math.nan, pairs)
    tail = (1 - INSIDE) / 2
    low, high = (float(q) for q in np.quantile(null, (tail, 1 - tail)))
    middle = 0.0 if centred else float(null.mean())
    beyond = int((np.abs(null - middle) >= abs(value - middle) - TINY).sum())
    return Tau(value, low, high, (1 + beyond) / (1 + len(null)), pairs)


def matched(train_loss: FloatArray, tolerance: float) -> IntArray:
    """Return which networks were trained to about the same loss: the largest such subset.

    Their losses lie within [L, L·(1 + tolerance)] for one L; of several subsets as large, the one
    of the lowest losses. What is not positive matches only its equal.

    Args:
        train_loss: (n,) values, NaN where unknown.
        tolerance: 0.1 for losses within ten per cent of the lowest among them.

    >>> matched(np.array([1.0, 0.021, 0.02, 0.0205, np.nan]), 0.1).tolist()
    [1, 2, 3]
    """
    known = np.flatnonzero(np.isfinite(train_loss))
    order = known[np.argsort(train_loss[known], kind="stable")]
    values = train_loss[order]
    upper = np.where(values > 0, values * (1 + tolerance), values)
    counts = np.searchsorted(values, upper, side="right") - np.arange(len(values))
    if not len(counts):
        return order.astype(np.int64)
    begin = int(np.argmax(counts))
    return np.sort(order[begin : begin + int(counts[begin])]).astype(np.int64)

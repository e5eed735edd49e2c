"""Persistence: the basins of a line or a plane, and how deep each is before it joins a deeper one.

Sublevel sets {L ≤ t}, from the lowest t upwards: a basin is born at its minimum and dies at the
saddle where it meets an older one (Edelsbrunner, Letscher, Zomorodian 2002, for H0). Its depth is
death - birth. Points enter in the order of their value, each joining all its neighbours that are
in (a line 2, a plane 8: a valley that runs diagonally is one basin); a union-find with the elder
rule makes the pairs, in O(N log N). The oldest basin never dies; what gaps cut off has its own.

Noise makes shallow basins. A pair counts as **deep** beyond 3 standard errors of its depth, which
is at most

    min( √(se_b² + se_d²),  diff_se_b + diff_se_d )

the first where errors of the same samples are not anticorrelated, the second always.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.measures.field import CERTAIN, Field, FloatArray
from lsweep.surfaces.surface import Surface

NEIGHBOURS = {1: 2, 2: 8}


@dataclass(frozen=True)
class Pair:
    """One basin.

    Attributes:
        birth: value at its minimum, in the metric's unit.
        death: value at the saddle where it joins an older basin; infinite for one that never does.
        minimum: offsets (x, y), or (x,).
        saddle: offsets; None where it never dies.
        noise: 3 standard errors of the depth at most; NaN where not known.
        border: the minimum lies on the border or beside a gap: what lies beyond may be lower.
        evaluated: the network was evaluated at both ends, none is interpolated.

    >>> Pair(0.5, 1.25, (0.0,), (1.0,), 0.1, False, True).depth
    0.75
    """

    birth: float
    death: float
    minimum: tuple[float, ...]
    saddle: tuple[float, ...] | None
    noise: float
    border: bool
    evaluated: bool

    @property
    def depth(self) -> float:
        """How much the loss must rise from the minimum to leave the basin."""
        return self.death - self.birth


@dataclass(frozen=True)
class Persistence:
    """The basins of a surface.

    Attributes:
        pairs: those that die, the deepest first.
        essential: those that never die, the lowest first: one unless gaps divide the surface.
        deep: how many pairs are deeper than ``threshold`` and than their noise, with both ends
            evaluated and the minimum not on the border.
        deep_border: how many more there are whose minimum lies on the border or beside a gap.
        shallow: how many are within ``threshold`` or noise.
        total: sum of the depths of the ``deep`` ones, in the metric's unit.
        largest: the largest of them; 0 where there are none.
        threshold: the least depth that was asked for.
        neighbours: how many a point has: 2 on a line, 8 on a plane.
        step: h, the smaller distance between neighbours, in offsets.
        notes: what the numbers rest on.

    >>> x = np.linspace(-1.5, 1.5, 31)
    >>> wells = Surface({"x": x}, {"train_loss": (x**2 - 1) ** 2 + 0.1 * x})
    >>> found = persistence(wells)
    >>> [(round(p.depth, 2), round(p.minimum[0], 1)) for p in found.pairs], found.deep
    ([(0.9, 1.0)], 1)
    """

    pairs: tuple[Pair, ...]
    essential: tuple[Pair, ...]
    deep: int
    deep_border: int
    shallow: int
    total: float
    largest: float
    threshold: float
    neighbours: int
    step: float
    notes: tuple[str, ...]

    def counts(self, pair: Pair) -> bool:
        """Return whether a pair that dies is deeper than threshold and noise, and evaluated."""
        least = max(self.threshold, 0.0 if np.isnan(pair.noise) else pair.noise)
        return pair.depth > least and pair.evaluated


def persistence(surface: Surface, name: str = "train_loss", threshold: float = 0.0) -> Persistence:
    """Return the basins of a line or a plane.

    Args:
        surface: a line or a plane of at least 2 points on each axis.
        name: the variable.
        threshold: pairs of at most this depth are not counted, whatever their noise.

    Raises:
        LsweepError: the surface has three axes or a single point on one.
    """
    field = Field.of(surface, name, least=2)
    border = _border(field.values)
    pairs = [_pair(field, border, *ends) for ends in _merges(field.values)]
    mortal = sorted((p for p in pairs if p.saddle), key=lambda p: (-p.depth, p.birth))
    essential = sorted((p for p in pairs if not p.saddle), key=lambda p: p.birth)
    draft = Persistence(
        tuple(mortal), tuple(essential), 0, 0, 0, 0.0, 0.0, threshold,
        NEIGHBOURS[len(field.offsets)], min(field.steps), (),
    )  # fmt: skip
    deep = [p for p in mortal if draft.counts(p)]
    inner = [p.depth for p in deep if not p.border]
    notes = list(field.notes)
    if len(essential) > 1:
        notes.append(f"points without a value divide the surface into {len(essential)} pieces")
    if mortal and all(np.isnan(p.noise) for p in mortal):
        notes.append("no standard error is known: no basin was tested against noise")
    resting = sum(not p.evaluated for p in mortal)
    if resting:
        notes.append(f"{resting} basins rest on interpolated points and do not count")
    return Persistence(
        draft.pairs,
        draft.essential,
        len(inner),
        len(deep) - len(inner),
        len(mortal) - len(deep),
        float(sum(inner)),
        float(max(inner, default=0.0)),
        threshold,
        draft.neighbours,
        draft.step,
        tuple(notes),
    )


def _merges(values: FloatArray) -> Iterator[tuple[int, int]]:
    """Yield (flat index of the minimum, of the saddle) of every basin; -1: it never dies.

    A basin that dies where it is born is none.
    """
    frame = np.pad(values, 1, constant_values=np.nan)  # so that every point has all neighbours
    flat = frame.ravel()
    height = flat.tolist()
    order = np.argsort(flat, kind="stable")[: int(np.isfinite(flat).sum())]
    strides = (frame.shape[-1], 1)[2 - frame.ndim :]
    steps = [int(np.dot(s, strides)) for s in np.ndindex(*(3,) * frame.ndim)]
    middle = sum(strides)
    around = [s - middle for s in steps if s != middle]
    parent = [-1] * flat.size  # of the points that are in; the root of a basin is its minimum
    inside = np.pad(np.arange(values.size).reshape(values.shape), 1, constant_values=-1).ravel()

    def root(point: int) -> int:
        while parent[point] != point:
            parent[point] = parent[parent[point]]
            point = parent[point]
        return point

    for point in order.tolist():
        roots = {root(point + a) for a in around if parent[point + a] >= 0} or {point}
        # The elder rule; of equal values the one that entered first is the elder.
        eldest = roots.pop() if len(roots) == 1 else min(roots, key=lambda r: (height[r], r))
        parent[point] = eldest
        for r in roots - {eldest}:
            parent[r] = eldest
            if height[r] < height[point]:
                yield int(inside[r]), int(inside[point])
    for r in order.tolist():
        if parent[r] == r:
            yield int(inside[r]), -1


def _border(values: FloatArray) -> npt.NDArray[np.bool_]:
    """Return which points lie on the border or beside a gap."""
    gap = np.pad(np.isnan(values), 1, constant_values=True)
    found = np.zeros(values.shape, bool)
    for shift in np.ndindex(*(3,) * values.ndim):
        window = tuple(slice(s, s + n) for s, n in zip(shift, values.shape, strict=True))
        found |= gap[window]
    return found


def _pair(field: Field, border: npt.NDArray[np.bool_], birth: int, death: int) -> Pair:
    low = np.unravel_index(birth, field.values.shape)
    high = np.unravel_index(death, field.values.shape) if death >= 0 else None
    ends = [low] if high is None else [low, high]
    noise = float("nan")
    if high is not None:
        bounds = []
        if field.se is not None:
            bounds.append(np.hypot(field.se[low], field.se[high]))
        if field.diff_se is not None:
            bounds.append(field.diff_se[low] + field.diff_se[high])
        noise = CERTAIN * float(np.fmin.reduce(bounds)) if bounds else noise
    return Pair(
        float(field.values[low]),
        float("inf") if high is None else float(field.values[high]),
        _place(field, low),
        None if high is None else _place(field, high),
        noise,
        bool(border[low]),
        not any(bool(field.interpolated[e]) for e in ends),
    )


def _place(field: Field, index: tuple[Any, ...]) -> tuple[float, ...]:
    """Return offsets (x, y) or (x,) of an array index."""
    return tuple(float(c[i]) for c, i in zip(field.offsets, index, strict=True))[::-1]

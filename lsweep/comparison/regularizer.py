"""The regulariser's table: how each measure answers to weight decay, and by which channel.

Weight decay makes weights small, and a raw curvature grows with the inverse square of the weights'
scale whatever else happens. A measure in the filter metric does not see the scale. So the answer
of a raw measure splits in two: ln raw = ln(raw / filter-normalised) + ln filter-normalised, a scale
channel and a shape channel, whose slopes add up.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
KEYS = ("weight_decay", "wd", "l2")
FILTER = "filter_"
"""Stands before the name of a measure's twin in the filter metric."""
CURVATURES = ("hessian_max", "hessian_min", "hessian_trace")
"""Those that scale with the inverse square of the weights."""
NORM = "weight_norm"


@dataclass(frozen=True)
class Response:
    """How one positive number answers to the regulariser, all other hyper-parameters equal.

    Attributes:
        name: of the measure.
        channel: ``""``, ``scale`` or ``shape``.
        slope: of ln measure on ln regulariser within groups; NaN where it is always one value.
        slope_se: its standard error over networks, or None with too few.
        networks: how many the slope rests on; those at 0 have no logarithm and do not count.
        ratio: geometric mean over groups of (at the largest value) / (at the smallest, 0 included).
        low: smallest ratio of a group.
        high: largest ratio of a group.
        groups: how many the ratio rests on.
        left_out: networks whose number is missing or not positive.
    """

    name: str
    channel: str
    slope: float
    slope_se: float | None
    networks: int
    ratio: float
    low: float
    high: float
    groups: int
    left_out: int


def key_of(axes: Sequence[str]) -> str | None:
    """Return which hyper-parameter is the regulariser, or None.

    >>> key_of(["depth", "wd"])
    'wd'
    """
    return next((k for k in KEYS if k in axes), None)


def channels(names: Sequence[str], shapes: Collection[str] = ()) -> list[tuple[str, str, str]]:
    """Return (row, channel, twin) for every row of the table, a raw measure before its channels.

    A raw curvature with a twin in the filter metric is followed by its scale channel, raw over
    twin, and by its shape channel, the twin.

    Args:
        names: of the measures.
        shapes: those along filter-normalised directions.

    >>> for row in channels(["hessian_max", "filter_hessian_max", "b"], {"b"}): print(row)
    ('hessian_max', '', '')
    ('hessian_max / filter_hessian_max', 'scale', 'filter_hessian_max')
    ('filter_hessian_max', 'shape', '')
    ('b', 'shape', '')
    """
    rows = []
    for name in names:
        twin = FILTER + name
        raw = name.removeprefix(FILTER)
        if raw != name and raw in CURVATURES and raw in names:
            continue  # told below the raw one
        shape = name in shapes or raw != name
        rows.append((name, "scale" if name == NORM else "shape" if shape else "", ""))
        if name in CURVATURES and twin in names:
            rows += [(f"{name} / {twin}", "scale", twin), (twin, "shape", "")]
    return rows


def table(
    measures: Mapping[str, FloatArray],
    settings: Sequence[Mapping[str, Any]],
    key: str,
    others: Sequence[str],
    shapes: Collection[str] = (),
) -> list[Response]:
    """Return the response of every measure and of its channels.

    Args:
        measures: name -> (n,) values, NaN where unknown.
        settings: hyper-parameters of each network.
        key: which of them is the regulariser.
        others: the other ones, equal within a group.
        shapes: names of measures along filter-normalised directions.
    """
    rows = []
    for name, channel, twin in channels(list(measures), shapes):
        values = measures[name] if name in measures else measures[name.partition(" / ")[0]]
        if twin:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = values / measures[twin]
        rows.append(respond(name, channel, values, settings, key, others))
    return rows


def respond(
    name: str,
    channel: str,
    values: FloatArray,
    settings: Sequence[Mapping[str, Any]],
    key: str,
    others: Sequence[str],
) -> Response:
    r"""Return how one number answers to the regulariser.

    slope = Σ (x - x̄_g)(y - ȳ_g) / Σ (x - x̄_g)², x = ln λ, y = ln measure, x̄_g and ȳ_g means over
    the networks of one group, which share all other hyper-parameters; its standard error is that of
    least squares with one intercept a group.

    >>> settings = [{"wd": w} for w in (0.0, 0.01, 0.1, 1.0)]
    >>> r = respond("m", "", np.array([1.0, 2.0, 20.0, 200.0]), settings, "wd", [])
    >>> round(r.slope, 6), r.networks, round(r.ratio, 6)
    (1.0, 3, 200.0)
    """
    strength = np.array([float(s[key]) for s in settings])
    usable = np.isfinite(values) & (values > 0)
    y = np.log(np.where(usable, values, 1.0))
    keys = [tuple(repr(s.get(o)) for o in others) for s in settings]
    groups = [
        np.flatnonzero(usable & np.array([k == g for k in keys])) for g in dict.fromkeys(keys)
    ]
    dx, dy, intercepts = [], [], 0
    for members in groups:
        positive = members[strength[members] > 0]
        x = np.log(strength[positive])
        if len(positive) > 1 and np.ptp(x) > 0:
            dx.append(x - x.mean())
            dy.append(y[positive] - y[positive].mean())
            intercepts += 1
    slope, se, count = math.nan, None, 0
    if dx:
        x, v = np.concatenate(dx), np.concatenate(dy)
        count, spread = len(x), float(x @ x)
        slope = float(x @ v) / spread
        free = count - intercepts - 1
        if free > 0:
            se = math.sqrt(float(((v - slope * x) ** 2).sum()) / free / spread)
    ratios = []
    low, high = float(strength.min()), float(strength.max())
    for members in groups:
        ends = [members[strength[members] == end] for end in (low, high)]
        if low < high and all(len(e) for e in ends):
            ratios.append(float(y[ends[1]].mean() - y[ends[0]].mean()))
    found = np.exp(ratios) if ratios else np.array([math.nan])
    middle = math.exp(float(np.mean(ratios))) if ratios else math.nan
    return Response(name, channel, slope, se, count, middle, float(found.min()),
                    float(found.max()), len(ratios), int((~usable).sum()))  # fmt: skip

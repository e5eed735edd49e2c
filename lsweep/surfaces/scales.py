"""Scales: how values become heights and colours, and which of them are printed beside the picture.

Everything is drawn at ``T = forward(value)``: the identity, ``ln L``, or ``asinh((L - L0) / s)``.
A contour between two points is then placed where the *drawn* quantity says it is, which matters
when neighbours differ by decades. This module imports no matplotlib, so that refinement, whose
tolerance is defined on the same log scale, can use it for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError

FloatArray = npt.NDArray[np.float64]
BANDS = 12
"""Bands between the lowest and the highest level of a contour picture."""

WIDE = 100.0
"""Two decades: what spans more is drawn on a log scale, unless its reader says otherwise."""

_CROWDED = 1 / 3  # share of the distinct values in one band, beyond which levels follow the values
_DISTINCT = 1e-4  # of the range: values that are nearer to each other than this are drawn as one

_SPARE = 0.2  # of the drawn range: what the highest values may take without being cut off

_HUGE = 1e300  # beyond it a difference of two values is no longer a float64
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Transform(NamedTuple):
    """A monotone map from values to the drawn quantity T, and back; both take any shape.

    Attributes:
        forward: value -> T; NaN where the value has none.
        inverse: T -> value.
        name: ``linear``, ``ln`` or ``asinh``.

    >>> Transform(np.log, np.exp, "ln").name
    'ln'
    """

    forward: Callable[[npt.ArrayLike], FloatArray]
    inverse: Callable[[npt.ArrayLike], FloatArray]
    name: str


def _identity(values: npt.ArrayLike) -> FloatArray:
    return np.clip(np.asarray(values, np.float64), -_HUGE, _HUGE)


LINEAR = Transform(_identity, _identity, "linear")


def log_scale(values: npt.ArrayLike, *, center: float = math.nan) -> Transform:
    """Return the log scale of ``values``: ln L if all are positive, else asinh((L - L0) / s).

    L0 is ``center``, or the minimum where that is not finite; s is the median of |L - L0| (its
    mean where the median is 0, and 1 where both are). Only finite values count.

    Args:
        values: any shape; NaN and Inf are left out.
        center: the value at offset 0.

    >>> log_scale([1.0, np.e, np.nan]).forward([1.0, np.e, -1.0])
    array([ 0.,  1., nan])
    >>> t = log_scale([-1.0, 0.0, 3.0], center=0.0)  # s = median of 1, 0, 3
    >>> t.name, np.sinh(t.forward([-1.0, 0.0, 3.0])).round(12), t.inverse(t.forward(3.0)).round(12)
    ('asinh', array([-1.,  0.,  3.]), np.float64(3.0))
    """
    v = np.asarray(values, np.float64)
    finite = v[np.isfinite(v)]
    if (finite > 0).all():
        return Transform(_ln, _exp, "ln")
    zero = float(center) if math.isfinite(center) else float(finite.min())
    distance = np.abs(_identity(finite) - zero)
    width = float(np.median(distance)) or float(np.mean(distance)) or 1.0

    def forward(values: npt.ArrayLike) -> FloatArray:
        with np.errstate(over="ignore"):
            ratio = (_identity(values) - zero) / width
        return np.asarray(np.arcsinh(_identity(ratio)))

    def inverse(transformed: npt.ArrayLike) -> FloatArray:
        with np.errstate(over="ignore"):
            return _identity(zero + width * np.sinh(np.asarray(transformed, np.float64)))

    return Transform(forward, inverse, "asinh")


def _ln(values: npt.ArrayLike) -> FloatArray:
    v = np.asarray(values, np.float64)
    return np.log(v, out=np.full(v.shape, np.nan), where=v > 0)


def _exp(transformed: npt.ArrayLike) -> FloatArray:
    with np.errstate(over="ignore"):
        return _identity(np.exp(np.asarray(transformed, np.float64)))


@dataclass(frozen=True)
class Scale:
    """The range that a picture shows, in units of the metric, and what lies outside of it.

    Attributes:
        low, high: the lowest and the highest level; low < high.
        least, greatest: the extremes of the finite values, which may lie outside.
        transform: value -> drawn quantity.
        cuts: the levels in T, rising, where they are not even; (): evenly spaced.

    >>> s = Scale.of([np.array([1.0, 10.0, 100.0])], log=True, vmax=10.0)
    >>> s.levels(3).round(9), s.extend
    (array([ 1.        ,  3.16227766, 10.        ]), 'max')
    """

    low: float
    high: float
    least: float
    greatest: float
    transform: Transform = LINEAR
    cuts: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        values: Iterable[FloatArray],
        *,
        log: bool | None = False,
        center: float = math.nan,
        vmin: float | None = None,
        vmax: float | None = None,
        quantile: float = 0.98,
    ) -> Scale:
        """Return the scale from the minimum of all finite values to the highest of their quantiles.

        What lies beyond the quantile is only cut off where it would take more than a fifth of the
        colours.

        Levels are even in T. Where one band would then hold more than a third of the distinct
        values they are even in ½F + ½T/range, F the share of these below: half of the bands for
        where the values are, half for how far they reach.

        Args:
            values: arrays of any shape; several pictures on one scale give several.
            log: use `log_scale` instead of the identity; None: where they span over two decades.
            center: L0 of `log_scale`.
            vmin: lowest level instead of the minimum.
            vmax: highest level instead of the quantile.
            quantile: 0.98 for maps, whose corners would else take all colours; 1 for lines.

        Raises:
            LsweepError: ``vmin`` is not below ``vmax``, or not positive where ln is used.

        >>> s = Scale.of([np.append(np.arange(100.0), [np.nan, np.inf, 500.0])])
        >>> s.low, s.high, s.greatest
        (0.0, 98.0, 500.0)
        >>> Scale.of([np.arange(101.0)]).high
        100.0
        >>> Scale.of([np.array([1.0, 3.0, 300.0])], log=None).transform.name
        'ln'
        """
        each = [_identity(v[np.isfinite(v)]) for v in values]
        # Of each array by itself, or the picture with most points would cut off the others.
        tops = [float(np.quantile(v, quantile)) for v in each if len(v)]
        finite = np.concatenate(each or [np.empty(0)])
        if log is None:
            log = _is_wide(finite, center, vmin, max(tops, default=0.0) if vmax is None else vmax)
        transform = log_scale(finite, center=center) if log else LINEAR
        if not len(finite):
            finite = np.array([1.0 if vmin is None else vmin])
        least, greatest = float(finite.min()), float(finite.max())
        top = max(tops, default=greatest)
        for key, bound in {"vmin": vmin, "vmax": vmax}.items():
            if bound is not None and not math.isfinite(bound):
                raise LsweepError(f"{key} = {bound:g}: needs to be finite")
            if bound is not None and transform.name == "ln" and bound <= 0:
                raise LsweepError(f"{key} = {bound:g}: needs to be above 0 on a log scale")
        low = least if vmin is None else vmin
        high = vmax if vmax is not None else top
        if vmax is None:
            bottom, edge, end = (float(v) for v in transform.forward([low, high, greatest]))
            if not _apart(transform, low, high) or end - edge <= _SPARE * (end - bottom):
                high = greatest
        if not _apart(transform, low, high):
            if vmin is not None and vmax is not None:
                raise LsweepError(f"vmin = {vmin:g} is not below vmax = {vmax:g}")
            low, high = _around(transform, vmin, vmax, low)
        cuts = _cuts(transform.forward(finite), *transform.forward([low, high]))
        return cls(low, high, least, greatest, transform, cuts)

    @property
    def above(self) -> bool:
        """True when finite values lie above the highest level."""
        return self.greatest > self.high

    @property
    def below(self) -> bool:
        """True when finite values lie below the lowest level."""
        return self.least < self.low

    @property
    def extend(self) -> Literal["neither", "min", "max", "both"]:
        """Which ends of the colour bar are open, in matplotlib's words."""
        if self.above:
            return "both" if self.below else "max"
        return "min" if self.below else "neither"

    def levels(self, count: int = BANDS + 1) -> FloatArray:
        """Return (count,) levels from ``low`` to ``high``, evenly spaced in T or as `cuts` say."""
        level = self.transform.inverse(self.drawn_levels(count))
        level[[0, -1]] = self.low, self.high
        return level

    def drawn_levels(self, count: int = BANDS + 1) -> FloatArray:
        """Return the same levels in T."""
        cuts = np.array(self.cuts or self.limits)
        places = np.linspace(0.0, len(cuts) - 1.0, count)
        return np.asarray(np.interp(places, np.arange(len(cuts)), cuts))

    @property
    def limits(self) -> tuple[float, float]:
        """``low`` and ``high`` as drawn, in units of T."""
        return float(self.transform.forward(self.low)), float(self.transform.forward(self.high))

    def ticks(self, most: int = 7) -> tuple[FloatArray, list[str]]:
        """Return at most ``most`` values within the range, and how they are written.

        They are round, or every second level where levels are uneven.

        >>> Scale(0.1, 1000.0, 0.1, 1000.0, log_scale([1.0])).ticks()[1]
        ['0.1', '1', '10', '100', '1000']
        """
        if self.cuts:
            tick = self.levels()[:: math.ceil(BANDS / (most - 1))]
            short = [number(float(v)) for v in tick]
            return tick, short if len({*short}) == len(short) else numbers(tick)
        return round_ticks(self.low, self.high, self.transform, most)


def _is_wide(finite: FloatArray, center: float, vmin: float | None, high: float) -> bool:
    """Whether linear levels would hide most of a range: over two decades of it, or of asinh."""
    if not len(finite):
        return False
    low = float(finite.min()) if vmin is None else vmin
    transform = log_scale(finite, center=center)
    if transform.name == "ln":
        return high > WIDE * low > 0
    low, high = (float(transform.forward(v)) for v in (low, high))
    return high - low > math.asinh(WIDE)


def _cuts(t: FloatArray, low: float, high: float) -> tuple[float, ...]:
    """Return uneven levels in T for crowded values, see `Scale.of`; () where even ones do."""
    place = np.unique(np.round((t - low) / (high - low) / _DISTINCT)) * _DISTINCT
    place = place[(place >= 0) & (place <= 1)]
    held, _ = np.histogram(place, BANDS, (0.0, 1.0))
    if len(place) <= BANDS or held.max() <= _CROWDED * len(place):
        return ()
    share = np.unique([0.0, *place, 1.0])
    both = (np.linspace(0.0, 1.0, len(share)) + share) / 2
    at = low + (high - low) * np.interp(np.linspace(0.0, 1.0, BANDS + 1), both, share)
    return (low, *at[1:-1].tolist(), high)


def _apart(transform: Transform, low: float, high: float) -> bool:
    """Whether the range holds BANDS distinct levels in float64."""
    ends = (low, high), (float(transform.forward(low)), float(transform.forward(high)))
    return all(b - a > 1e-12 * max(abs(a), abs(b)) for a, b in ends)


def _around(
    transform: Transform, vmin: float | None, vmax: float | None, value: float
) -> tuple[float, float]:
    """Return a range for values that are all equal, or all beyond the one bound that was given.

    The value is in the middle of a band: rounding, or rounding's last bit, must not draw an edge.
    """
    more = 2 * BANDS / (BANDS - 1) - 1
    if transform.name == "ln":
        low, high = value / 1.1, value * 1.1**more
    else:
        margin = 0.1 * abs(value) or 1.0
        low, high = value - margin, value + more * margin
    if vmin is not None:
        return vmin, high
    if vmax is not None:
        return (vmax / 1.1 if transform.name == "ln" else vmax - (0.1 * abs(vmax) or 1.0)), vmax
    return low, high


def round_ticks(
    low: float, high: float, transform: Transform, most: int = 7
) -> tuple[FloatArray, list[str]]:
    """Return (n <= most) round values in [low, high] that are well apart in T, and their texts.

    >>> round_ticks(0.0, 1.0, LINEAR)[1]
    ['0', '0.2', '0.4', '0.6', '0.8', '1']
    """
    start, stop = float(transform.forward(low)), float(transform.forward(high))
    decades = (stop - start) / math.log(10) if transform.name == "ln" else 0.0
    if transform.name == "linear" or (transform.name == "ln" and decades < 0.7):
        tick = _linear_ticks(low, high, most)
    elif transform.name == "ln":
        tick = _decade_ticks(low, high, decades, most)
    else:
        tick = _asinh_ticks(start, stop, transform, most)
    slack = 1e-9 * (stop - start)
    at = transform.forward(tick)
    tick = tick[(at >= start - slack) & (at <= stop + slack)]
    return tick, numbers(tick)


def _linear_ticks(low: float, high: float, most: int) -> FloatArray:
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    steps = (m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0))
    step = next(s for s in steps if s >= raw * (1 - 1e-9))
    index = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return np.unique([float(f"{i * step:.15g}") for i in index[: most + 1]])


def _decade_ticks(low: float, high: float, decades: float, most: int) -> FloatArray:
    mantissas = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    stride = max(1, math.ceil(decades / (most - 1)))
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    first -= first % stride
    powers = range(first, last + 1, stride)
    return np.array([float(f"{m}e{p}") for p in powers for m in mantissas if -308 < p < 309])


def _asinh_ticks(start: float, stop: float, transform: Transform, most: int) -> FloatArray:
    """Round evenly spaced places to as few digits as leave each within a fifth of the spacing."""
    step = (stop - start) / (most - 1)
    tick = []
    for t in np.linspace(start, stop, most):
        value = float(transform.inverse(t))
        candidates = [0.0, *(float(f"{value:.{digits}e}") for digits in range(17))]
        near = (abs(float(transform.forward(c)) - t) < 0.2 * step for c in candidates)
        tick.append(next((c for c, ok in zip(candidates, near, strict=True) if ok), value))
    return np.unique(tick)


def number(value: float, digits: int = 3) -> str:
    """Return a value as a reader of a figure expects it.

    >>> number(0.123456), number(-1.5e-7), number(1e30), number(float("nan"))
    ('0.123', '−1.5×10⁻⁷', '10³⁰', 'nan')
    """
    if value and math.isfinite(value) and 1e3 <= abs(value) < 1e5:
        digits = max(digits, len(str(int(abs(value)))))
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text.replace("-", "−")
    mantissa, exponent = text.split("e")
    sign = "−" if mantissa.startswith("-") else ""
    mantissa = mantissa.lstrip("-")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return sign + (power if mantissa == "1" else f"{mantissa}×{power}")


def numbers(values: npt.ArrayLike) -> list[str]:
    """Return values with as few digits as tell them apart.

    >>> numbers([1.0, 1.00001])
    ['1', '1.00001']
    """
    v = np.unique(np.asarray(values, np.float64))
    for digits in range(3, 18):
        exact = [abs(float(f"{x:.{digits}g}") - x) for x in v]
        if len(v) < 2 or max(exact) < 0.02 * float(np.diff(v).min()):
            break
    return [number(float(x), digits) for x in np.asarray(values, np.float64)]

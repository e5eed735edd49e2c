"""A field: one metric on a line or a plane, with its errors, ready for what looks at neighbours.

Whoever measures a surface needs the same four things: the values with a gap wherever there is
none, the standard errors in the two forms that are stored, the distance between points, and words
for what the numbers then rest on. Shapes: ``(n,)`` on a line, ``(ny, nx)`` on a plane.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.surfaces.scales import log_scale
from lsweep.surfaces.surface import Status, Surface

FloatArray = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
CERTAIN = 3.0
"""Standard errors that a difference must exceed to count as seen."""


@dataclass(frozen=True)
class Field:
    """One metric on a line or a plane.

    Attributes:
        name: the variable.
        offsets: coordinates along each array axis: ((ny,) of y, (nx,) of x), or ((n,) of x,).
        values: loss, or the metric's unit; NaN where pending, failed or not finite.
        se: standard error of each value over samples, same shape; None where not known.
        diff_se: standard error of each value's difference to the centre; None where not known.
        center: index of offset 0, or None where it is no point.
        interpolated: which values are interpolated.
        lost: why points have no value, each reason with its count: ``2 not finite``.

    >>> x = np.array([-1.0, 0.0, 1.0])
    >>> f = Field.of(Surface({"x": x}, {"train_loss": np.array([1.0, 0.5, np.inf])}))
    >>> f.values, f.center, f.notes
    (array([1. , 0.5, nan]), (1,), ('1 of 3 points left out: 1 not finite',))
    """

    name: str
    offsets: tuple[FloatArray, ...]
    values: FloatArray
    se: FloatArray | None
    diff_se: FloatArray | None
    center: tuple[int, ...] | None
    interpolated: Mask
    lost: tuple[str, ...]

    @classmethod
    def of(cls, surface: Surface, name: str = "train_loss", *, least: int = 1) -> Field:
        """Return a variable of a line or a plane.

        Raises:
            LsweepError: there is no such variable, the surface has three axes, or an axis has
                fewer than ``least`` points.
        """
        if len(surface.axes) > 2 or min(surface.shape) < least:
            raise LsweepError(
                f"{name}: this number is that of a line or a plane with at least {least} points "
                f"on each axis, not of {' x '.join(map(str, reversed(surface.shape)))}"
            )
        raw = surface[name]
        good = np.isfinite(raw) & (surface.status != Status.PENDING)
        counts = {
            "pending": surface.status == Status.PENDING,
            "failed": surface.status == Status.FAILED,
        }
        lost = {what: int((mask & ~good).sum()) for what, mask in counts.items()}
        lost["not finite"] = int((~good).sum()) - sum(lost.values())
        zeros = [np.flatnonzero(c == 0.0) for c in reversed(list(surface.axes.values()))]
        return cls(
            name,
            tuple(reversed(list(surface.axes.values()))),
            np.where(good, raw, np.nan),
            surface.values.get(f"{name}_se"),
            surface.values.get(f"{name}_diff_se"),
            tuple(int(z[0]) for z in zeros) if all(len(z) for z in zeros) else None,
            surface.status == Status.INTERPOLATED,
            tuple(f"{n} {what}" for what, n in lost.items() if n),
        )

    @property
    def steps(self) -> tuple[float, ...]:
        """The distance between neighbours along each array axis, in offsets."""
        return tuple(float(c[1] - c[0]) for c in self.offsets)

    @property
    def zero(self) -> float:
        """The value at the centre.

        Raises:
            LsweepError: the centre is no point, or has no value.
        """
        value = float("nan") if self.center is None else float(self.values[self.center])
        if not np.isfinite(value):
            raise LsweepError(f"{self.name} has no value at the centre (offset 0)")
        return value

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the values: how many are missing."""
        notes = []
        if self.lost:
            count = int(np.isnan(self.values).sum())
            notes.append(f"{count} of {self.values.size} points left out: {', '.join(self.lost)}")
        return tuple(notes)

    def drawn(self) -> tuple[FloatArray, str]:
        """Return the values on the scale on which roughness is told, and its name.

        log(1 + L) where no value is negative, else the asinh scale of `lsweep.surfaces.scales`: a
        loss of 0 is finite on both, and decades of a rim do not hide what happens near the centre.

        >>> Field.of(Surface({"x": np.arange(2.0)}, {"a": np.array([0.0, np.e - 1])}), "a").drawn()
        (array([0., 1.]), 'log1p')
        """
        known = self.values[np.isfinite(self.values)]
        if not len(known) or known.min() >= 0:
            return np.log1p(self.values), "log1p"
        center = float("nan") if self.center is None else float(self.values[self.center])
        transform = log_scale(known, center=center)
        return transform.forward(self.values), transform.name

"""Audits: how far values were from a second evaluation by eager in float32 (or float64)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lsweep.plans.plan import Plan
from lsweep.storage.rows import Kind, Rows
from lsweep.storage.sums import means
from lsweep.surfaces.surface import Status

FloatArray = npt.NDArray[np.float64]
BELOW = 1e-3  # of the usual value: near a minimum of zero a relative error says nothing


def audited_variables(plan: Plan) -> list[int]:
    """Return which variables are compared: the loss of each split, or the first that is a mean."""
    names = plan.variable_names
    means_ = [k for k, name in enumerate(names) if name not in plan.pointwise]
    return [k for k in means_ if plan.variables[k][1] == "loss"] or means_[:1] or [0]


def compared(
    values: Rows,
    audits: Rows,
    variables: Sequence[int],
    tolerance: Callable[[Rows], FloatArray] | None = None,
) -> dict[str, float]:
    """Compare some variables of rows with those that audit them.

    Args:
        values: rows, shape (n,).
        audits: of the same points and slices, shape (n,).
        variables: which of their variables.
        tolerance: how far off each of some rows may be, shape (n,).

    Returns:
        numbers of evaluations and of distinct points, the largest and median differences, and the
        difference that is furthest beyond its tolerance, with that; empty where n is 0.

    >>> from lsweep.storage.rows import row_type
    >>> values, audits = np.zeros((2, 1), row_type(1))
    >>> values["sums"][..., :3], audits["sums"][..., :3] = (2, 4, 3.0), (2, 4, 2.0)  # W, WW, WV
    >>> audits["status"] = Status.OK
    >>> compared(values, audits, [0])["largest_relative"]
    0.5
    """
    if not len(audits):
        return {}
    done = audits["status"] == Status.OK
    first, again = (
        np.stack([means(rows["sums"][done, k]) for k in variables]) for rows in (values, audits)
    )  # (variables, rows)
    finite = np.isfinite(first) & np.isfinite(again)
    unlike = np.isfinite(first) != np.isfinite(again)
    difference = np.abs(np.where(finite, first, 0.0) - np.where(finite, again, 0.0))
    size = np.abs(np.where(finite, again, np.nan))
    usual = [float(np.median(s[np.isfinite(s)])) if np.isfinite(s).any() else 0.0 for s in size]
    floor = np.maximum(BELOW * np.array(usual), 1e-300)[:, None]
    relative = difference / np.fmax(size, floor)
    worst = {}
    if tolerance is not None and finite.any():
        allowed = np.broadcast_to(tolerance(values[done]), relative.shape)
        at = np.unravel_index(np.where(finite, relative - allowed, -np.inf).argmax(), finite.shape)
        worst = {"worst_relative": float(relative[at]), "tolerance": float(allowed[at])}
    return {
        **worst,
        "points": float(done.sum()),
        "distinct": float(len(np.unique(values["point"][done]))),
        "failed": float((audits["status"] == Status.FAILED).sum()),
        "one_finite": float(unlike.any(axis=0).sum()),
        "largest_absolute": float(difference.max(initial=0.0)),
        "largest_relative": float(relative.max(initial=0.0)),
        "median_relative": float(np.median(relative[finite])) if finite.any() else 0.0,
    }


def audit_lines(audit: Mapping[str, float]) -> list[str]:
    """Return what people must know of an audit, as `compared` returns it, in lines."""
    out = []
    if audit.get("failed"):
        out.append(f"backend check: {audit['failed']:.0f} points could not be evaluated again")
    if audit.get("one_finite"):
        out.append(
            f"backend check: {audit['one_finite']:.0f} points are finite in one "
            "evaluation and not in the other: do not trust these values"
        )
    if audit.get("worst_relative", 0.0) > audit.get("tolerance", math.inf):
        out.append(
            "backend check: evaluated again by eager a value differs by "
            f"{audit['worst_relative']:.1e} (relative), more than "
            f"{audit['tolerance']:.0e}: do not trust these values"
        )
    return out


class Audits:
    """Audits among rows as they are read: each comes soon after the value that it audits.

    Attributes:
        unit: how many points a unit has at most; audits follow a unit's values.
    """

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self._tails: dict[str, Rows] = {}
        self._pairs: list[tuple[Rows, Rows]] = []

    def add(self, part: str, rows: Rows) -> None:
        """Take the rows that come next in a part."""
        if part in self._tails:
            rows = np.concatenate([self._tails[part], rows])
        audits = np.flatnonzero(rows["kind"] == Kind.AUDIT)
        audits = audits[audits >= len(self._tails.get(part, ()))]  # others have their values
        if len(audits):
            audited = np.isin(rows["point"], rows["point"][audits])
            values = np.flatnonzero(audited & (rows["kind"] == Kind.VALUE))
            found = dict(zip(_keys(rows[values]), values.tolist(), strict=True))
            pairs = zip(_keys(rows[audits]), audits.tolist(), strict=True)
            at = np.array([(found[k], i) for k, i in pairs if k in found], dtype=np.int64)
            value, audit = at.reshape(-1, 2).T
            self._pairs.append((rows[value], rows[audit]))
        self._tails[part] = rows[-2 * self.unit :].copy()

    def compared(
        self, variables: Sequence[int], tolerance: Callable[[Rows], FloatArray] | None = None
    ) -> dict[str, float]:
        """Return what `compared` finds in all that were read."""
        if not self._pairs:
            return {}
        values, audits = (np.concatenate(rows) for rows in zip(*self._pairs, strict=True))
        return compared(values, audits, variables, tolerance)


def _keys(rows: Rows) -> Iterable[tuple[int, int]]:
    points: npt.NDArray[np.int64] = rows["point"].astype(np.int64)
    return zip(points.tolist(), rows["slice"].tolist(), strict=True)

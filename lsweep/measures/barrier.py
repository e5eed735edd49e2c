"""The barrier between two networks: how far the loss rises on the straight line between them.

sup_a L((1-a)·A + a·B) - (L(A) + L(B))/2 (Frankle et al. 2020, arXiv:1912.05671), and the same over
the straight line between the two losses, which asks no more of the better of two unequal networks
than that it gets worse evenly. Two networks are called linearly connected where the error barrier
is below 2 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.outcomes.measured import Measured
from lsweep.surfaces.surface import Surface

FloatArray = npt.NDArray[np.float64]
STABLE = 2.0  # per cent of error: Frankle's bound
ERROR = "accuracy"  # what is 100 - error, in per cent


def rise(values: FloatArray, x: FloatArray, line: bool) -> tuple[float, int]:
    """Return the largest rise over the ends, and where.

    Args:
        values: (n,) from A at the first offset to B at the last; lower is better.
        x: (n,) offsets, increasing.
        line: over the straight line between the ends, instead of over their mean.

    Returns:
        the rise and its index; NaN where a value is not known.

    >>> rise(np.array([1.0, 4.0, 2.0]), np.array([0.0, 0.5, 1.0]), line=False)
    (2.5, 1)
    """
    a, b = float(values[0]), float(values[-1])
    share = (x - x[0]) / (x[-1] - x[0])
    base = a + share * (b - a) if line else np.full_like(x, (a + b) / 2)
    rises = values - base
    if not np.isfinite(rises).all():
        return float("nan"), 0
    top = int(np.argmax(rises))
    return float(rises[top]), top


def barriers(
    surface: Surface, name: str, contexts: Mapping[str, Mapping[str, Any]]
) -> list[Measured]:
    """Return the barriers of a line from A at 0 to B at 1, one per loss and error and baseline.

    Args:
        surface: of a line of kind ``to``.
        name: of the measure, "barrier" or "barrier_aligned".
        contexts: split -> what its numbers must be read with.

    Returns:
        numbers with a bound of the standard error over samples: that of L(a) - L(A), plus that of
        L(B) - L(A) times its share in the baseline. Both are of paired differences.
    """
    plan = surface.provenance["plan"]["evaluate"]
    out = []
    for split in plan["splits"]:
        for metric in plan["metrics"]:
            variable = f"{split}_{metric}"
            known = surface[variable]
            error = metric == ERROR
            values = 100 - known if error else known
            spread = surface.values.get(f"{variable}_diff_se")
            label = f"{split}_error" if error else variable
            for line in (False, True):
                value, at = rise(values, surface.x, line)
                share = float(surface.x[at]) if line else 0.5
                se = None if spread is None else float(spread[at] + share * spread[-1])
                words = [
                    "over the line between the two ends" if line else "over the mean of the ends",
                    f"at x = {surface.x[at]:.3g}",
                ]
                if error and not line:
                    words.append(f"{'below' if value < STABLE else 'not below'} {STABLE:g} %")
                more = {"ends": [float(values[0]), float(values[-1])]}
                out.append(
                    Measured(
                        f"{name}{'_over_line' if line else ''}@{label}", value, se,
                        "" if se is None else "samples", {**contexts[split], **more},
                        ", ".join(words),
                    )
                )  # fmt: skip
    return out

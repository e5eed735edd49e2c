"""Quadratic: how far along an eigenvector the loss would go, if it stayed what it is near by.

A direction of kind hessian is as long as a random one, whose curvature is the mean of all; along
the top eigenvector, which bends hundreds of times as much, an offset of 1 lies far outside of what
the eigenvalue describes, and the saddle that such a plane is for is a speck at its centre.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

FAR = 10.0  # times the offset at which the quadratic has grown to the loss's own size


def quadratic_lines(axis: str, facts: Mapping[str, Any], ends: Sequence[float]) -> list[str]:
    """Return what the curvature along an eigenvector says of the range that is asked.

    The loss is L(0) + ½·λ·‖d‖²·x² near the centre. It is followed up to where it has risen by its
    value at the centre, or by 1 (a nat of cross-entropy) where that is less; where λ < 0, until it
    has fallen to 0.

    Args:
        axis: its name.
        facts: of the axis in the plan: ``eigenvalue`` λ, ``norm`` ‖d‖, ``loss`` L(0).
        ends: the lowest and the highest offset.

    Returns:
        One line, and another with a range to take where the asked one goes `FAR` times as far;
        none where λ is 0.

    >>> quadratic_lines("x", {"eigenvalue": 8.0, "norm": 5.0, "loss": 0.1}, (-1, 1))
    ['if the loss stays quadratic, it rises by 100 at x = 1, and by 1 at x = 0.1']
    >>> quadratic_lines("y", {"eigenvalue": -8.0, "norm": 5.0, "loss": 0.01}, (-1, 1))[1]
    'the range [-1, 1] goes 100 times as far: take one near ±0.02 to see that curvature'
    """
    bend, loss = facts["eigenvalue"] * facts["norm"] ** 2 / 2, facts.get("loss") or 0.0
    if not bend or not math.isfinite(bend):
        return []
    if bend > 0:
        goal = max(1.0, loss)
        own = f"by {loss:.3g}, what it is at the centre," if loss > 1 else "by 1"
        words = f"rises by {bend:.3g}", own
    else:
        goal = loss if loss > 0 else 1.0
        words = f"falls by {-bend:.3g}", "to 0" if loss > 0 else "by 1"
    there = math.sqrt(goal / abs(bend))
    out = [
        f"if the loss stays quadratic, it {words[0]} at {axis} = 1, and {words[1]} at {axis} = "
        f"{there:.2g}"
    ]
    times = max(map(abs, ends)) / there
    if times > FAR:
        low, high = ends
        out.append(
            f"the range [{low:g}, {high:g}] goes {times:.0f} times as far: take one near "
            f"±{2 * there:.1g} to see that curvature"
        )
    return out

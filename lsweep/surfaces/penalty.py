"""The penalty: weight decay's term added to a surface of the data's loss, after the fact.

Training with weight decay minimises L(θ) + λ/2·‖θ‖². A run stores ‖θ‖² at every point, exactly, so
both landscapes come from one sweep: without the term and, for any λ, with it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from lsweep.errors import LsweepError
from lsweep.surfaces.surface import Surface


def with_l2(surface: Surface, strength: float | None) -> Surface:
    """Return a surface whose losses are L(θ) + λ/2·‖θ‖² over all parameters.

    Standard errors stay as they are, for the term is the same in every sample; so does the
    refinement's stated error in units of the loss, while its share of a logarithmic range, which is
    another one now, is left out. Steps of a trajectory keep no loss: their ‖θ‖² is not stored.

    Args:
        surface: of a run.
        strength: λ, at least 0; None for the surface as it is.

    Raises:
        LsweepError: λ is negative or not finite, or the surface has no loss or no ``weight_sq``.

    >>> import numpy as np
    >>> values = {"train_loss": np.array([1.0, 2.0]), "weight_sq": np.array([4.0, 6.0])}
    >>> with_l2(Surface({"x": np.array([0.0, 1.0])}, values), 0.5)["train_loss"]
    array([2. , 3.5])
    """
    if strength is None:
        return surface
    if not 0 <= strength < math.inf:
        raise LsweepError(f"--l2 {strength:g}: a finite number from 0")
    losses = [n for n in surface.metrics if n == "loss" or n.endswith("_loss")]
    if not losses:
        raise LsweepError("--l2 adds to a loss, and this surface has none")
    if "weight_sq" not in surface.values:
        raise LsweepError(
            "--l2 needs ‖θ‖² at every point (weight_sq), which every run of lsweep stores and "
            "this surface does not: render or measure the run itself"
        )
    term = f"{strength:g}/2·‖θ‖²"
    shares = {f"{n}_error" for n in losses}
    values = {n: v for n, v in surface.values.items() if n not in shares}
    attributes = {n: dict(a) for n, a in surface.attributes.items() if n not in shares}
    for n in losses:
        values[n] = values[n] + strength / 2 * surface["weight_sq"]
        about = attributes.setdefault(n, {"metric": "loss"})
        about["long_name"] = f"{about.get('long_name') or n.replace('_', ' ')} + {term}"
    trajectory = surface.trajectory
    if trajectory is not None:
        kept = {n: v for n, v in trajectory.values.items() if n not in losses}
        trajectory = replace(trajectory, values=kept)
    caption = surface.provenance.get("caption")
    told = f"The loss is that of the data + {term} over all parameters."
    provenance = {**surface.provenance, "l2": strength,
                  "caption": f"{caption} {told}" if caption else told}  # fmt: skip
    return replace(surface, values=values, attributes=attributes, trajectory=trajectory,
                   provenance=provenance, title=f"{surface.title}, loss + {term}")  # fmt: skip

"""The anchor: the value at the centre over all data, where the sweep itself takes a subset.

The control variate rests on it (`variates.py`). It is computed once for a device class and frozen
in its file; in plain float32 whatever the precision asked for, for the error of reduced precision
at the centre cancels in l(θ) - l(θ₀).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from lsweep.axes.directions import Directions
from lsweep.backends.packed import Spot
from lsweep.evaluating.evaluate import Evaluator
from lsweep.plans.pointwise import POINTWISE
from lsweep.problems.problem import Problem


def anchored(problem: Problem, evaluate: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Return variable -> its value at the centre over all data.

    Nothing of a split that is not cut, where a value depends on its batch (``batch_norm``), and of
    an opaque batch mean.

    Args:
        problem: at its trained weights, its splits cut to the subset.
        evaluate: the plan's ``evaluate`` table.
        device: where to evaluate.

    Raises:
        LsweepError: the problem fails on data outside the subset.
    """
    splits = {name: problem.splits[name].whole for name in evaluate["splits"]}
    wholes = {name: whole for name, whole in splits.items() if whole is not None}
    stored = [m for m in evaluate["metrics"] if m not in POINTWISE]
    if not wholes or not stored or evaluate["batch_norm"] != "eval":
        return {}
    plain = {**evaluate, "splits": list(wholes), "slices": 1, "backend": "eager"}
    if evaluate["precision"] != "float64":
        plain["precision"] = "float32"
    there = dataclasses.replace(problem, data=wholes)
    with Evaluator(there, plain, Directions({}, (), {}), device) as evaluator:
        names, means = evaluator.names, _at_centre(evaluator)
    return {n: mean for n, mean in zip(names, means, strict=True) if math.isfinite(mean)}


def let_go(problem: Problem) -> None:
    """Forget the data outside the subset, so that no worker keeps all of it in memory."""
    for split in problem.splits.values():
        split.whole = None


def _at_centre(evaluator: Evaluator) -> list[float]:
    """Return each variable's mean over all data; NaN of an opaque one."""
    samples = evaluator.fitted(
        lambda: evaluator.whole(Spot(())), "the problem fails at its own weights, on all the data"
    )
    return [
        math.nan if s.opaque else float((s.weights * s.values).sum() / s.weights.sum())
        for s in samples
    ]

"""Variates: what is known of all data corrects what was found on a subset, and its standard errors.

A subset of n of N samples, the same at every point: its standard errors carry the finite-population
factor √(1 - n/N) (Cochran, Sampling Techniques, 1977, section 2.6). They are those of a plain draw,
which is conservative where classes were drawn in proportion.

The control variate anchored at the centre c: L(c) + mean_B[l(θ) - l(c)], the first over all data.
B being the same at every point, this moves a whole surface by one number, L(c) - mean_B l(c), and
its standard error is that of the difference. It helps where l(θ) and l(c) go together, so it is
used for a variable when at half of the points or more that error is the smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.plans.plan import Plan

FloatArray = npt.NDArray[np.float64]
Anchor = Mapping[str, Mapping[str, float]]


def finite_population(samples: int, of: int) -> float:
    """Return √(1 - n/N), by which a draw without replacement is more certain.

    >>> finite_population(75, 100)
    0.5
    """
    return math.sqrt(1 - samples / of)


def gain(se: FloatArray, diff_se: FloatArray) -> float:
    """Return the median over points of diff_se/se: below 1 the control variate helps.

    A ratio point by point, so that a region of large losses does not decide for all; NaN without
    any point that has both.

    >>> gain(np.array([1.0, 1.0, 1.0]), np.array([0.0, 0.5, 3.0]))
    0.5
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = diff_se / se
    ratio = ratio[np.isfinite(ratio)]
    return float(np.median(ratio)) if len(ratio) else math.nan


def correct(
    values: dict[str, FloatArray], plan: Plan, anchors: Iterable[Anchor]
) -> dict[str, dict[str, Any]]:
    """Correct, in place, the variables of splits that were cut to a subset.

    Args:
        values: name -> (points,) values, and ``NAME_se``, ``NAME_diff_se`` over the subset.
        plan: which splits were cut, and to how many of how many samples.
        anchors: what workers found at the centre; the first that knows a variable counts.

    Returns:
        Variable -> ``samples``, ``of``, ``classes``, ``gain``, ``shift``; nothing of splits that
        are whole. ``shift`` is what was added, or None where no control variate is used.
    """
    known = list(anchors)
    out = {}
    for (split, metric), name in zip(plan.variables, plan.variable_names, strict=True):
        data = plan.data[split]
        if "of" not in data:
            continue
        fact = {"samples": data["samples"], "of": data["of"], "classes": data["classes"]}
        out[name] = {**fact, "gain": None, "shift": None}
        se, diff = values.get(f"{name}_se"), values.get(f"{name}_diff_se")
        for error in (se, diff):
            if error is not None:
                error *= finite_population(data["samples"], data["of"])
        if se is None or diff is None:
            continue
        found = gain(se, diff)
        anchor = next((a[name] for a in known if a.get(name)), None)
        if math.isfinite(found):
            out[name]["gain"] = found
        # A share, such as an accuracy, would be moved beyond its bounds.
        if anchor is not None and found < 1 and metric == "loss":
            shift = anchor["whole"] - anchor["subset"]
            values[name] += shift
            se[:] = diff
            out[name]["shift"] = shift
    return out


def annotate(
    attributes: dict[str, dict[str, str]], sampling: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """Return a surface's attributes, with how many samples stand for how many, and how."""
    for name, fact in sampling.items():
        drawn = f"{fact['samples']} of {fact['of']}"
        how = f"class by class ({fact['classes']})" if fact["classes"] else "at random"
        attributes[name]["samples"] = f"{drawn}, drawn {how}, the same at every point"
        if fact["shift"] is not None:
            attributes[name]["estimator"] = (
                "control variate anchored at the centre: mean over the subset of l - l(centre), "
                f"plus the centre's mean over all samples; moved by {fact['shift']:.6g}"
            )
        for suffix in ("se", "diff_se"):
            if f"{name}_{suffix}" in attributes:
                bound = ", classes not counted: conservative" if fact["classes"] else ""
                attributes[f"{name}_{suffix}"]["replicate"] = (
                    f"samples ({drawn}, finite-population corrected{bound})"
                )
    return attributes


def words(sampling: Mapping[str, Any]) -> list[str]:
    """Return what a caption says about it.

    >>> words({"train_loss": {"shift": 0.01}, "train_accuracy": {"shift": None}})
    ['train loss by a control variate anchored at the centre']
    """
    used = [n.replace("_", " ", 1) for n, fact in sampling.items() if fact["shift"] is not None]
    return [f"{' and '.join(used)} by a control variate anchored at the centre"] if used else []

"""From the surface alone: what the values of a line or a plane tell, as measured numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lsweep.errors import LsweepError
from lsweep.measures.basins import basin
from lsweep.measures.central import central
from lsweep.measures.convexity import nonconvexity
from lsweep.measures.persistence import persistence
from lsweep.measures.roughness import roughness
from lsweep.outcomes.measured import Measured
from lsweep.plans.rounds import stated_error
from lsweep.refinement.audit import phrase
from lsweep.surfaces.surface import Status, Surface

RESIDUAL = "_residual"


def context_of(surface: Surface, split: str) -> dict[str, Any]:
    """Return what a number of a surface must be read with, from its provenance.

    Args:
        surface: of a run; one without provenance has no context.
        split: the data split that the number is of.

    Returns:
        ``samples``, ``of`` (where it is a subset), ``batch_norm``, ``precision``, ``l2`` (where a
        penalty was added to the losses); of a random direction ``seed``, ``normalize``,
        ``ignore``, ``gauge``, ``parameters`` (where not all).
    """
    plan = surface.provenance.get("plan")
    penalty = {"l2": surface.provenance["l2"]} if "l2" in surface.provenance else {}
    if not plan or split not in plan["data"]:
        return penalty
    evaluate, data = plan["evaluate"], plan["data"][split]
    devices = surface.provenance.get("devices", {}).values()
    counted = next((d["samples"].get(split) for d in devices), None)
    out = {"split": split, "samples": counted or data["samples"], **penalty}
    if "of" in data:
        out["of"] = data["of"]
    used = surface.provenance.get("numerics", {}).get("precision", evaluate["precision"])
    out |= {"batch_norm": evaluate["batch_norm"], "precision": used}
    recipes = [plan["directions"][axis] for axis in sorted(plan["directions"])]
    recipe = next((r for r in recipes if r["kind"] == "random"), recipes[0])
    out["seed"] = recipe["seed"]
    if recipe["kind"] == "random":
        out["normalize"] = recipe["normalize"]
    out["ignore"] = recipe["ignore"]
    out["gauge"] = _gauge(plan)
    if list(recipe["parameters"]) != ["*"]:
        out["parameters"] = list(recipe["parameters"])
    return out


def _gauge(plan: Mapping[str, Any]) -> str:
    """Return the gauge of all axes, which start from one origin."""
    return next((r["gauge"] for r in plan["directions"].values() if "gauge" in r), "none")


def split_of(surface: Surface, name: str) -> str:
    """Return the data split that a variable is of."""
    said = surface.attributes.get(name, {}).get("split")
    return said or name.partition("_")[0]


def centre_of(surface: Surface, name: str) -> float:
    """Return a variable at the trained weights; NaN where nobody evaluated them.

    The workers did so before all else, also where the lattice has no point there.
    """
    value = surface.center(name)
    if math.isfinite(value) or "l2" in surface.provenance:  # workers know of no penalty
        return value
    devices = surface.provenance.get("devices", {})
    found = (devices[d]["centre"].get(name) for d in sorted(devices))
    return next((float(v) for v in found if v is not None), math.nan)


def rows_at_centre(surface: Surface) -> list[Measured]:
    """Return every metric at the trained weights, and the norm of the weights."""
    out = []
    for name in surface.metrics:
        value, split = centre_of(surface, name), split_of(surface, name)
        if math.isnan(value) and (not surface.complete or "l2" in surface.provenance):
            continue
        if name.removesuffix(RESIDUAL) in surface.metrics and name.endswith(RESIDUAL):
            continue  # it stands beside what it is of
        errors = surface.values.get(f"{name}_se")
        se = None if errors is None else surface.center(f"{name}_se")
        sampling = surface.provenance.get("sampling", {}).get(name, {})
        anchored = sampling.get("shift") is not None  # its value here is that of all samples
        known = se is not None and math.isfinite(se) and not anchored
        of = f", over all {sampling['of']} samples" if anchored else ""
        units = surface.attributes.get(name, {}).get("units", "1")
        context = context_of(surface, split) | ({"units": units} if units != "1" else {})
        if f"{name}{RESIDUAL}" in surface.metrics:
            context["residual"] = centre_of(surface, f"{name}{RESIDUAL}")
        out.append(
            Measured(name, value, se if known else None, "samples" if known else "", context,
                     f"at the trained weights{of}")
        )  # fmt: skip
    square = surface.center("weight_sq") if "weight_sq" in surface.values else math.nan
    plan = surface.provenance.get("plan")
    if not math.isfinite(square) and plan and plan["facts"].get("weight_sq"):
        square = float(plan["facts"]["weight_sq"]["origin"])
    if math.isfinite(square):
        about: dict[str, Any] = {}
        if plan:
            about = {"weights": plan["facts"]["parameters"], "gauge": _gauge(plan)}
        out.append(Measured("weight_norm", math.sqrt(square), context=about, note="‖θ‖₂"))
    return out


def rows_of_plane(surface: Surface, name: str) -> tuple[list[Measured], list[str]]:
    """Return the numbers of a line or a plane, and in lines what could not be computed.

    Args:
        surface: a line or a plane; of a volume there is nothing but its minimum.
        name: the variable.
    """
    context = context_of(surface, split_of(surface, name)) | {
        "range": [[float(c[0]), float(c[-1])] for c in surface.axes.values()],
        "grid": " x ".join(str(len(c)) for c in surface.axes.values()),
    }
    rows: list[Measured] = []
    refused: list[str] = []
    if not np.isfinite(surface[name]).any():
        return [], [f"no value of {name} is finite"] if surface.complete else []
    for reader in _READERS:
        try:
            found = reader(surface, name)
        except LsweepError as e:
            refused += [str(e)] if str(e) not in refused else []
            continue
        rows += [row for row in found if not math.isnan(row.value)]
        refused += [f"{r.name}: {r.note or 'no value'}" for r in found if math.isnan(r.value)]
    if rest := on_interpolated(surface, name):
        context["values"] = rest
    return [dataclasses.replace(r, context={**context, **r.context}) for r in rows], refused


def on_interpolated(surface: Surface, name: str) -> str:
    """Say that numbers rest on interpolated values, how far those may be off, and who checked."""
    if not (surface.status == Status.INTERPOLATED).any():
        return ""
    error = surface.values.get(f"{name}_error")
    evaluated = int(surface.evaluated.sum())
    words = f"from interpolated values: {evaluated} of {surface.status.size} points evaluated"
    if error is not None:
        of = "of the log range" if name.endswith("_loss") else "of the range"
        words += f", {stated_error(float(np.nanmax(error)), of)}"
    refinement = surface.provenance.get("refinement") or {}
    checked = phrase(refinement.get("audit") or {}, name)
    return f"{words}; {checked or 'no interpolation check'}"


def guessed(surface: Surface, name: str, where: Mapping[str, float]) -> str:
    """Return "" where a value was evaluated, or that it is interpolated, with its stated error.

    >>> values = {"a": np.ones(1), "a_abs_error": np.full(1, 3e-4)}
    >>> line = Surface({"x": np.zeros(1)}, values, np.array([Status.INTERPOLATED], np.uint8))
    >>> guessed(line, "a", {"x": 0.0})
    'interpolated, ± 0.0003'
    """
    if surface.evaluated_at(where):
        return ""
    error = surface.values.get(f"{name}_abs_error")
    if error is None:
        return "interpolated"
    at = tuple(int(np.flatnonzero(surface.axes[d] == where[d])[0]) for d in surface.dimensions)
    return f"interpolated, ± {error[at]:.1g}"


def finite_within(surface: Surface, name: str) -> str:
    """Return how far around the centre all values are finite, where not all are.

    >>> line = Surface({"x": np.linspace(-1, 1, 5)}, {"a": np.array([0.0, 1, 2, np.nan, 4])})
    >>> finite_within(Surface(line.axes, {"a": [np.inf, 1, 2, 3, np.inf] * np.ones(5)}), "a")
    'finite within |x| <= 0.5: a smaller range'
    >>> finite_within(line, "a")
    ''
    """
    sizes = {d: np.abs(surface.axes[d]) for d in surface.dimensions}
    each = np.meshgrid(*(s / max(s.max(), 1e-300) for s in sizes.values()), indexing="ij")
    radius = np.max(each, axis=0)
    known = surface.status != Status.PENDING
    bad = known & ((surface.status == Status.NONFINITE) | ~np.isfinite(surface[name]))
    inside = radius < np.min(radius[bad], initial=np.inf)
    if not bad.any() or not inside.any():
        return ""
    far = float(radius[inside].max())
    bounds = {d: float(s[s <= far * s.max()].max(initial=0.0)) for d, s in sizes.items()}
    if not all(bounds.values()):
        return ""
    words = ", ".join(f"|{d}| <= {bound:.3g}" for d, bound in sorted(bounds.items()))
    return f"finite within {words}: a smaller range"


def _minimum(surface: Surface, name: str) -> list[Measured]:
    where, least = surface.minimum(name)
    at = ", ".join(f"{axis} = {offset:.4g}" for axis, offset in where.items())
    guess = guessed(surface, name, where)
    kind = f", {guess}" if guess else ""
    same = ", constant to rounding" if surface.constant(name) else ""
    return [Measured("minimum", least, context={"at": where}, note=f"at {at}{kind}{same}")]


def _convexity(surface: Surface, name: str) -> list[Measured]:
    if len(surface.axes) != 2:
        return []
    found = nonconvexity(surface, name)
    shared = {"step": found.step, "threshold": found.threshold}
    notes = "; ".join(found.notes)
    return [
        Measured("nonconvex_fraction", found.plain, context={**shared, "cells": found.cells},
                 note=notes),
        Measured("nonconvex_fraction_guarded", found.guarded,
                 context={**shared, "cells": found.guarded_cells},
                 note="; ".join(["beyond noise and with both steps h, 2h", *found.notes])),
    ]  # fmt: skip


def _basin(surface: Surface, name: str) -> list[Measured]:
    found = basin(surface, name)
    shared = {"rise": found.rise, "cells": found.cells}
    notes, at = "; ".join(found.notes), f"@{found.rise:g}"
    about = "; ".join([f"of {found.rays} rays", *found.notes])
    se = found.share_se
    return [
        # The same samples serve every point, so its error is one over samples.
        Measured(f"basin_share{at}", found.share, se, "" if se is None else "samples", shared,
                 notes),
        Measured(f"basin_area{at}", found.area, context=shared, note=notes),
        Measured(f"basin_width_least{at}", found.least, context=shared, note=about),
        Measured(f"basin_width_median{at}", found.median, context=shared, note=about),
    ]  # fmt: skip


def _roughness(surface: Surface, name: str) -> list[Measured]:
    found = roughness(surface, name)
    shared = {"step": found.step, "scale": found.scale}
    notes = list(found.notes)
    each = (
        ("roughness", found.variation, "mean total variation / range along rays; 1 is monotone"),
        ("largest_gradient", found.gradient, f"of {found.scale}, per offset"),
        ("gradient_95", found.gradient_95, "its 95 % quantile"),
        ("gradient_lipschitz", found.curvature, f"largest curvature of {found.scale}"),
    )
    return [
        Measured(key, value, context=shared, note="; ".join([words, *notes]))
        for key, value, words in each
    ]


def _persistence(surface: Surface, name: str) -> list[Measured]:
    found = persistence(surface, name)
    shared = {"step": found.step, "neighbours": found.neighbours}
    inside = f"{found.deep_border} more on the border, {found.shallow} within noise"
    each = (
        ("basins", float(found.deep + len(found.essential)), f"deeper than noise; {inside}"),
        ("basin_depths", found.total, "sum of the depths of all but the deepest"),
        ("deepest_second_basin", found.largest, "depth"),
    )
    return [
        Measured(key, value, context=shared, note="; ".join([words, *found.notes]))
        for key, value, words in each
    ]


def _central(surface: Surface, name: str) -> list[Measured]:
    found = central(surface, name)
    shared = {"radius": found.radius, "points": found.points, "misfit": found.residual}
    notes = "; ".join([f"quadratic fit, {found.residual:.1%} left over", *found.notes])
    fit = {"fit_se": found.se} if math.isfinite(found.se) else {}
    out = [Measured("plane_curvature_max", found.largest, context={**shared, **fit}, note=notes)]
    if len(surface.axes) == 2:
        out += [
            Measured("plane_curvature_min", found.smallest, context={**shared, **fit}, note=notes),
            Measured("plane_anisotropy", found.anisotropy, context=shared, note=notes),
        ]
    return out


_READERS: tuple[Callable[[Surface, str], list[Measured]], ...] = (
    _minimum,
    _convexity,
    _basin,
    _roughness,
    _persistence,
    _central,
)

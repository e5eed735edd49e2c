"""The caption: what a reader of a picture must know, from the plan and the pre-flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lsweep.plans.plan import Plan
from lsweep.plans.recipes import STILL
from lsweep.wording import counted

_COUNTED = {
    "replicate": "number of the replicate",
    "layer": "number of the layer that moves",
    "radius": "radius",
}


def describe_recipe(recipe: dict[str, Any]) -> str:
    """Return a direction's recipe in a few words.

    >>> describe_recipe({"kind": "random", "normalize": "filter", "seed": 0})
    'random, filter-normalised, seed 0'
    """
    if recipe["kind"] in STILL:
        return _COUNTED[recipe["kind"]]
    words = [str(recipe["kind"])]
    if recipe["kind"] == "to":
        words = [f"to {recipe['checkpoint']}"]
    if recipe["kind"] == "file":
        words = [f"from {recipe['file']}"]
    if recipe.get("eigenvector"):
        words = [f"hessian, eigenvector {recipe['eigenvector']}"]
    if recipe["normalize"] != "none":
        words.append(f"{recipe['normalize']}-normalised")
    if recipe["kind"] == "random":
        words.append(f"seed {recipe['seed']}")
    return ", ".join(words)


def title(plan: Plan) -> str:
    """Return what is shown, in one short line."""
    shape = {0: "centre", 1: "line", 2: "plane", 3: "volume"}[len(plan.moving)]
    kinds = dict.fromkeys(str(plan.directions[a]["kind"]) for a in plan.moving)
    words = [" and ".join(k for k in kinds if k != shape), shape]
    each = " and ".join(str(plan.directions[a]["kind"]) for a in plan.axes if a not in plan.moving)
    return f"{plan.facts['network']}: {' '.join(filter(None, words))}" + (
        f" per {each}" if each else ""
    )


def caption(
    plan: Plan,
    devices: Mapping[str, Any],
    notes: Sequence[str] = (),
    audit: Mapping[str, float] | None = None,
    audited: str = "",
) -> str:
    """Return what a reader of the picture must know: network, directions, samples, batch norm.

    Args:
        plan: of the run.
        devices: device class -> what its file says.
        notes: what else is to be said.
        audit: how far second evaluations were from the first.
        audited: the variables that they are of.
    """
    words = [f"{plan.facts['network']}, {plan.facts['parameters']:,} parameters"]
    if any(r.get("gauge", "none") == "equi" for r in plan.directions.values()):
        words.append("equi-normalised first")
    for axis in plan.axes:
        facts, recipe = plan.facts["axes"][axis], plan.directions[axis]
        text = f"{axis}: {describe_recipe(recipe)}"
        if axis not in plan.moving:
            words.append(text)
            continue
        if recipe["ignore"] != "none":
            text += f", {recipe['ignore']} ignored"
        if "explained" in facts:
            text += (
                f", explains {facts['explained']:.0%} of the path "
                f"(a random walk: {facts['random_walk_null']:.0%})"
            )
        if "eigenvalue" in facts:
            doubt = "" if facts["converged"] else ", not converged"
            text += f", eigenvalue {facts['eigenvalue']:.4g}{doubt}"
        if facts["zero_filters"]:
            text += f", filters of norm zero: {facts['zero_filters']}"
        words.append(text)
    if len(plan.axes) == len(plan.moving) == 2:
        words.append(f"cos(x, y) = {plan.facts['cosines'][0][1]:+.3f}")
    samples: dict[str, int] = next((d["samples"] for d in devices.values()), {})
    counts = []
    for s in plan.evaluate["splits"]:
        known = plan.data[s]
        of = f" of {known['of']}" if "of" in known else ""
        counts.append(f"{samples.get(s) or known['samples'] or '?'}{of} {s}")
    words.append(f"{' and '.join(counts)} samples, the same at every point")
    words += notes
    check = next((d["batch_norm"] for d in devices.values() if d["batch_norm"]), None)
    mode = str(plan.evaluate["batch_norm"])
    if check:
        what = check["variable"].replace("_", " ")
        words.append(
            f"batch norm {mode} (recalibrated statistics change {what} by up to "
            f"{check['largest_relative']:.0%} at |offset| = 1)"
        )
    elif mode != "eval":
        words.append(f"batch norm {mode}")
    rounded = "weights" in plan.facts
    asked = str(plan.evaluate["precision"])
    words.append(_precision(asked, devices, audit or {}, audited, rounded))
    return "; ".join(words) + "."


def _precision(
    asked: str,
    devices: Mapping[str, Any],
    audit: Mapping[str, float],
    audited: str,
    rounded: bool,
) -> str:
    """In what precision it was computed, and how far from float32 that was found to be."""
    used = {name: d["precision"] for name, d in devices.items()}
    each = list(dict.fromkeys(used.values()))
    words = asked
    if len(each) > 1:
        words = f"{asked} allowed, " + ", ".join(f"{p} on {name}" for name, p in used.items())
    elif each and each[0] != asked:
        words = f"{each[0]} ({asked} was allowed)"
    words += ", of float64 weights" if rounded else ""
    if asked not in ("float64", "float32") and "largest_relative" in audit:
        what = audited.replace("_", " ")
        again = f"{counted(int(audit['distinct']), 'point')} evaluated again by eager in float32"
        far = f"{audit['largest_relative']:.1e}" if audit["largest_relative"] else "0"
        words += f", backend check: {what} off by up to {far} (relative) at {again}"
    return words

"""Measures: numbers computed from surfaces, without the network.

From a run's own surface, and from the child runs in its ``measures/`` that are complete.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lsweep.errors import LsweepError
from lsweep.measures.convexity import nonconvex_fraction
from lsweep.measures.field import CERTAIN
from lsweep.measures.from_children import Finished, rows_of
from lsweep.measures.from_surface import (
    centre_of,
    context_of,
    on_interpolated,
    rows_at_centre,
    rows_of_plane,
)
from lsweep.merging.merge import merge
from lsweep.merging.opening import open_surface
from lsweep.outcomes.certified import invariance_measures
from lsweep.outcomes.committed import read_run
from lsweep.outcomes.measured import Measured
from lsweep.plans.children import CHILDREN, Child
from lsweep.plans.plan import LIVE, Plan
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.penalty import with_l2
from lsweep.surfaces.surface import Surface

ALIKE = 1e-3  # relative; what one direction tells exactly, as in one dimension, has no error
VAGUE = 0.2  # of a number: two that are known no better than this cannot be told apart
MAP = "convexity"
ROUTES = {"direction_curvature": "filter_hessian_trace", "spectral_trace": "hessian_trace"}
COMPARABLE = {
    "split": "split",
    "samples": "samples",
    "of": "samples",
    "batch_norm": "batch norm",
    "precision": "precision",
    "ignore": "weights",
    "parameters": "weights",
    "gauge": "gauge",
}
"""What two routes must have in common to lead to one number: key of the context -> in words."""


@dataclass(frozen=True)
class Report:
    """What was measured of one run or surface.

    Attributes:
        source: the path of the run or the surface; "" for a surface in memory.
        plan: the digest of its plan; "" where there is none.
        rows: the numbers.
        missing: what was not measured, why, and what computes it; one line each.
        summary: what `measure` returns for a surface.
    """

    source: str
    plan: str
    rows: list[Measured]
    missing: list[str]
    summary: dict[str, Any] = field(default_factory=dict)


def measure_run(folder: RunFolder, name: str | None = None, l2: float | None = None) -> Report:
    """Return every number of a run that its surface and its complete children tell.

    Args:
        folder: the run, complete or not.
        name: the variable that is looked at as a landscape; by default the first, ``train_loss``.
        l2: λ of a penalty that is added to the surface's losses; children are of the loss without
            it, and are then left out.

    Raises:
        LsweepError: this is no run, or it has no such variable.
        DamagedFile: its plan or a round was altered.
    """
    plan = Plan.read(folder)
    surface, merged = merge(folder)
    surface = with_l2(surface, l2)
    report = measure_surface(surface, name, str(folder.root))
    missing = list(report.missing)
    if merged.missing:
        missing.insert(0, f"{merged.missing} of {merged.points} points are missing: "
                          f"'lsweep run {folder.root}' computes them")  # fmt: skip
    if l2 is not None:
        missing.append("what is measured at the centre: child runs are of the loss without --l2")
        return dataclasses.replace(report, missing=missing)
    rows, absent, live = [*report.rows, *_map_of(surface)], [], _is_live(surface)
    has_map = len(rows) > len(report.rows)
    known = [*CHILDREN, *(n for n in folder.all_children() if n not in CHILDREN)]
    for child in known:
        if not folder.child(child).exists:
            absent += [] if child == MAP and has_map else [CHILDREN[child]]
            continue
        try:
            found, trouble = _child_rows(folder, child, plan.origin)
        except LsweepError as e:
            found, trouble = [], [f"{child}: {e}"]
        rows += found
        missing += trouble
    try:
        certificate = invariance_measures(folder, report.plan)
    except LsweepError as e:
        certificate = []
        missing.append(str(e))
    rows += certificate
    if not certificate and not live:
        missing.append(f"which rescalings leave network and picture unchanged: "
                       f"'lsweep invariance {folder.root}' tests it")  # fmt: skip
    first = name or surface.metrics[0]
    context = {first: centre_of(surface, first)}
    rows = [dataclasses.replace(r, context={**r.context, **context}) for r in rows]
    return dataclasses.replace(
        report,
        rows=compared(rows),
        missing=missing + _how_to_get(folder, absent, live, plan.facts.get("refused", {})),
    )


def measure_surface(surface: Surface, name: str | None = None, source: str = "") -> Report:
    """Return the numbers that a surface alone tells.

    Raises:
        LsweepError: it has no variable ``name``.
    """
    first = name or surface.metrics[0]
    summary = _summary(surface, first)
    rows, refused = rows_of_plane(surface, first)
    digest = str(surface.provenance.get("plan_sha256", ""))
    return Report(source, digest, rows_at_centre(surface) + rows, refused, summary)


def measure_path(
    path: str | os.PathLike[str], name: str | None = None, l2: float | None = None
) -> Report:
    """Return the numbers of a run or of a surface file; arguments as in `measure_run`.

    Raises:
        LsweepError: there is neither.
    """
    folder = RunFolder(Path(path))
    if folder.exists:
        return measure_run(folder, name, l2)
    return measure_surface(with_l2(open_surface(path), l2), name, str(path))


def _map_of(surface: Surface) -> list[Measured]:
    """Return what the child `MAP` would tell, of a plane that was itself swept with its metric."""
    split = str(surface.provenance["plan"]["evaluate"]["splits"][0])
    if len(surface.axes) != 2 or f"{split}_hessian_ratio" not in surface.values:
        return []
    return rows_of(Finished(MAP, surface, context_of(surface, split)))


def _is_live(surface: Surface) -> bool:
    plan = surface.provenance.get("plan") or {}
    return bool(plan.get("problem", {}).get("factory", "") == LIVE)


def _child_rows(folder: RunFolder, name: str, origin: object) -> tuple[list[Measured], list[str]]:
    """Return what a child tells; nothing unless it is complete, but lines that say why.

    Args:
        folder: the parent.
        name: of the child.
        origin: what the parent's plan says of its weights.
    """
    child = folder.child(name)
    if Plan.read(child).origin != origin:
        return [], [f"{name}: {child.root} is of other weights than this run: remove that folder"]
    _, _, committed = read_run(child)
    if not committed.complete:
        done, total = committed.share
        return [], [f"{name}: {total - done} of {total} points are missing: 'lsweep run "
                    f"{folder.root} --measures {name}' computes them"]  # fmt: skip
    surface, merged = merge(child)
    trouble = [f"{name}: {n} points failed: {reason}" for reason, n in merged.failed.items()]
    if sum(merged.failed.values()) == merged.points:
        return [], trouble
    split = str(surface.provenance["plan"]["evaluate"]["splits"][0])
    return rows_of(Finished(name, surface, context_of(surface, split))), trouble


def _how_to_get(
    folder: RunFolder, absent: Sequence[Child], live: bool, refused: Mapping[str, str]
) -> list[str]:
    """Return one line for each measure at the centre that was never asked for, or cannot be."""
    if live and absent:
        names = ", ".join(c.name for c in absent)
        return [
            f"not measured at the centre: {names}; this run was made from a live model, "
            "which no command can load: make its problem with lsweep.Problem.from_factory"
        ]
    command = f"lsweep run {folder.root} --measures"
    never = {c.name: refused[m] for c in absent for m in c.metrics if m in refused}
    absent = [c for c in absent if c.name not in never]
    out = [f"{c.name} ({c.about}): '{command} {c.name}'" for c in absent if c.usual]
    if len(out) > 1:
        out.append(f"all of these: '{command} all'")
    out += [f"{name}: not of this network: {why}" for name, why in never.items()]
    rest = [c for c in absent if not c.usual and not c.beside]
    return out + [
        f"on request: {c.name} ({c.about}): '{command} {' '.join([c.name, c.needs]).strip()}'"
        for c in rest
    ]


def compared(rows: list[Measured]) -> list[Measured]:
    """Return rows, with a note where two routes lead to one number: whether they agree.

    >>> a = Measured("direction_curvature", 2.0, 0.1, "directions", {"normalize": "filter"})
    >>> b = Measured("filter_hessian_trace", 1.8, 0.0, "probes")
    >>> compared([a, b])[0].note
    'agrees with filter_hessian_trace (2.0 standard errors apart)'
    """
    named = {row.name: row for row in rows}
    out = []
    for row in rows:
        other = named.get(ROUTES.get(row.family, ""))
        if other is not None and row.context.get("normalize", "filter") == "filter":
            note = "; ".join(filter(None, [row.note, _agreement(row, other)]))
            row = dataclasses.replace(row, note=note)
        out.append(row)
    return out


def _agreement(a: Measured, b: Measured) -> str:
    other = [w for k, w in COMPARABLE.items() if a.context.get(k) != b.context.get(k)]
    if other:
        return f"not compared with {b.name}: other {', '.join(dict.fromkeys(other))}"
    error = math.hypot(a.se or 0.0, b.se or 0.0)
    gap = abs(a.value - b.value)
    if not math.isfinite(gap) or not math.isfinite(error):
        return ""
    apart = gap / error if error else math.inf if gap else 0.0
    size = max(abs(a.value), abs(b.value))
    if apart <= CERTAIN and error > VAGUE * size:
        share = error / size if size else math.inf
        return f"cannot be told from {b.name}: the error of their difference is {share:.0%}"
    if apart <= CERTAIN:
        return f"agrees with {b.name} ({apart:.1f} standard errors apart)"
    if gap <= ALIKE * size:
        return f"agrees with {b.name} (to {gap / size:.1g})"
    radius = a.context.get("radius")
    where = f": at r = {radius:g} it is another number" if radius else ""
    return f"differs from {b.name} by {apart:.1f} standard errors{where}"


def measure(surface: Surface | str | os.PathLike[str], name: str | None = None) -> dict[str, Any]:
    """Return what a surface, a run or a surface file tells about one metric.

    Of a refined surface most values are interpolated. What looks at neighbours is then computed
    from interpolated values, and that is said, with their stated error.

    Args:
        surface: a `Surface`, or the path of a run or of a surface file.
        name: the metric; by default the first, ``train_loss``.

    Returns:
        ``center``, ``minimum``, ``minimum_at``, ``points``, ``finite`` (share), and for planes
        ``nonconvex_fraction``; of a refined surface also ``evaluated`` (how many points),
        ``values`` (what the numbers were computed from) and ``minimum_is``. Of a path also
        ``measures``, all numbers as `Measured`, and ``missing``, what was not measured.

    Raises:
        LsweepError: there is no such metric, or nothing at the path.

    >>> x = np.linspace(-1, 1, 5)
    >>> bowl = Surface({"x": x, "y": x}, {"train_loss": np.add.outer(x**2, x**2)})
    >>> measure(bowl)["nonconvex_fraction"]
    0.0
    """
    if isinstance(surface, Surface):
        name = name or surface.metrics[0]
        surface.minimum(name)  # one without a finite value has none, and that is an error here
        return _summary(surface, name)
    report = measure_path(surface, name)
    return {**report.summary, "measures": report.rows, "missing": report.missing}


def _summary(surface: Surface, name: str) -> dict[str, Any]:
    out: dict[str, Any] = {
        "metric": name,
        "points": int(surface[name].size),
        "finite": float(np.isfinite(surface[name]).mean()),
        "center": surface.center(name),
    }
    if not out["finite"]:
        return out
    where, least = surface.minimum(name)
    out |= {"minimum": least, "minimum_at": where}
    if len(surface.axes) == 2 and min(surface.shape) >= 3:
        out["nonconvex_fraction"] = nonconvex_fraction(surface, name)
    if on_what := on_interpolated(surface, name):
        out |= {
            "evaluated": int(surface.evaluated.sum()),
            "values": on_what,
            "minimum_is": "evaluated" if surface.evaluated_at(where) else "interpolated",
        }
    return out

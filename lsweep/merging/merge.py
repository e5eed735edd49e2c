"""Merge: from committed rows to a surface; the same parts give the same bytes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.hosts.machine import versions
from lsweep.outcomes import variates
from lsweep.outcomes.audits import audit_lines, audited_variables, compared
from lsweep.outcomes.certified import notes
from lsweep.outcomes.committed import read_run
from lsweep.outcomes.estimates import estimate
from lsweep.outcomes.frozen import across_classes, audit_tolerances, coarsest, frozen
from lsweep.outcomes.winners import Winners
from lsweep.plans.caption import caption, describe_recipe, title
from lsweep.plans.plan import Plan
from lsweep.plans.points import IntArray, Lattice
from lsweep.plans.pointwise import Pointwise
from lsweep.plans.rounds import Rounds
from lsweep.refinement.gaps import fill_gaps
from lsweep.storage.folder import RunFolder
from lsweep.storage.rows import device_code
from lsweep.surfaces.surface import Status, Surface, Trajectory
from lsweep.wording import counted

FloatArray = npt.NDArray[np.float64]
ByteArray = npt.NDArray[np.uint8]


@dataclass
class Report:
    """What merging found.

    Attributes:
        points: how many points the surface has.
        evaluated: how many of them count as evaluated: the others are pending or interpolated.
        refined: how the refinement ended, or what it still lacks; "" without one.
        check: what the interpolation check found, or why it was not made.
        contradictions: what the audit of interpolated points says against their stated error.
        missing: how many of them are pending.
        asked: how many were asked so far, where a refinement is open; else 0.
        failed: reason -> how many points.
        nonfinite: how many are NaN or infinite, a result like others.
        conflicts: points whose rows disagree: non-determinism, or a device that errs.
        damaged: part name -> what is wrong with it.
        audit: how far second evaluations are from the first.
    """

    points: int = 0
    evaluated: int = 0
    refined: str = ""
    check: str = ""
    contradictions: list[str] = field(default_factory=list)
    missing: int = 0
    asked: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    nonfinite: int = 0
    conflicts: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    audit: dict[str, float] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """True when nothing is missing and nothing failed."""
        return not self.missing and not self.failed

    def lines(self) -> list[str]:
        """Return the report as lines for people; empty when there is nothing to tell."""
        out = []
        if self.refined:
            out.append(f"{self.evaluated} of {self.points} points evaluated, {self.refined}")
        out += [self.check] if self.check else []
        out += self.contradictions
        if self.asked:
            if self.asked > self.evaluated:
                left = f"{self.asked - self.evaluated} of {self.asked} points asked so far"
                out.append(f"{left} are missing")
        elif self.missing:
            out.append(f"{self.missing} of {self.points} points are missing")
        for reason, count in self.failed.items():
            out.append(f"{counted(count, 'point')} failed: {reason}")
        if self.nonfinite:
            out.append(f"{self.nonfinite} points are NaN or infinite: results, masked in pictures")
        if self.conflicts:
            out.append(f"{self.conflicts} points were computed twice with different values")
        out += audit_lines(self.audit)
        out += [f"{name}: {what}" for name, what in self.damaged.items()]
        return out


def merge(folder: RunFolder, parts: Sequence[Path] | None = None) -> tuple[Surface, Report]:
    """Merge all that is committed; points without a row are pending.

    Args:
        folder: the run.
        parts: merge these only; by default all.

    Raises:
        LsweepError: this is no run.
        DamagedFile: its plan or a round was altered.
    """
    plan = Plan.read(folder)
    rounds = Rounds.read(folder, plan)
    winners = Winners(folder, plan, rounds, parts)
    found = estimate(folder, plan, rounds, winners)
    values, status, opaque, sampling = found.values, found.status, found.opaque, found.sampling
    trajectory = _trajectory(values, rounds, plan)

    lattice = rounds.last.lattice
    numbers = rounds.numbers_of(lattice)
    # What was evaluated ahead and never asked for is there by chance.
    numbers[(numbers >= 0) & ~rounds.required[numbers]] = -1
    failed = numbers[(numbers >= 0) & (status[numbers] == Status.FAILED)]
    status = _gathered(status, numbers, Status.PENDING)
    for name in values:  # one at a time: of a large surface two copies are not made
        values[name] = _gathered(values[name], numbers, np.nan)
    classes = _classes(winners, numbers)
    if len(classes) > 1:
        device = winners.device[:, 0]
        index = np.searchsorted(sorted(classes), device).astype(np.float64)
        index[~np.isin(device, list(classes))] = np.nan
        values["device_class"] = _gathered(index, numbers, np.nan)
    gaps = fill_gaps(values, status, numbers, rounds, plan)
    damaged = winners.committed.damage
    devices = frozen(folder, plan, damaged)
    used = {name: devices[name] for name in classes.values() if name in devices}
    tolerance = across_classes(coarsest(plan, used))
    allowed = functools.partial(audit_tolerances, plan, devices)
    report = Report(
        points=len(lattice),
        evaluated=int(((status > 0) & (status < Status.INTERPOLATED)).sum()),
        refined=gaps.words,
        check=gaps.check,
        contradictions=gaps.contradictions,
        missing=int((status == Status.PENDING).sum()),
        asked=int((numbers >= 0).sum()) if rounds.refining else 0,
        failed=_reasons(winners, failed),
        nonfinite=int((status == Status.NONFINITE).sum()),
        conflicts=winners.conflicts(tolerance),
        damaged=damaged,
        audit=compared(*winners.audits(), audited_variables(plan), allowed),
    )
    provenance = _provenance(folder, plan, winners.seconds, report, classes, sampling, devices)
    attributes = variates.annotate(_attributes(plan, opaque), sampling) | gaps.attributes
    if rounds.last.refine is not None:
        provenance["refinement"] = gaps.facts
        provenance["caption"] += gaps.caption
    del winners, numbers
    shaped = {n: v.reshape(lattice.shape) for n, v in values.items()}
    if "linear" in plan.facts["weight_sq"]:
        shaped["weight_sq"] = _weight_squares(plan, lattice)
    surface = Surface(
        lattice.axes,
        shaped,
        status.reshape(lattice.shape),
        attributes,
        trajectory,
        provenance,
        title(plan),
        f"lsweep {versions()['lsweep']}: merge of plan {plan.digest[:12]}",
    )
    return surface, report


def _gathered(by_number: Any, numbers: IntArray, missing: Any) -> Any:
    """Return values in the order of a lattice; ``missing`` where a point was never asked."""
    found = by_number[numbers]
    found[numbers < 0] = missing
    return found


def _weight_squares(plan: Plan, lattice: Lattice) -> FloatArray:
    """||θ + Σ offset·d||² = ||θ||² + 2 Σ offset <θ, d> + Σ Σ offset offset' <d, d'>."""
    products = plan.facts["weight_sq"]
    linear, square = products["linear"], products["square"]
    offsets = np.meshgrid(*reversed(lattice.axes.values()), indexing="ij", sparse=True)[::-1]
    total = np.full(lattice.shape, float(products["origin"]))
    for a, offset in enumerate(offsets):
        total += 2 * linear[a] * offset
        for b, other in enumerate(offsets):
            total += square[a][b] * offset * other
    return total


def _reasons(winners: Winners, failed: IntArray) -> dict[str, int]:
    codes, counts = np.unique(winners.committed.standing()[1][failed], return_counts=True)
    texts = winners.committed.reasons
    return dict(sorted((texts[c], n) for c, n in zip(codes.tolist(), counts.tolist(), strict=True)))


def _classes(winners: Winners, numbers: IntArray) -> dict[int, str]:
    used = set(np.unique(winners.device[numbers[numbers >= 0]]).tolist()) - {0}
    classes = [p.header["device_class"] for p in winners.readers if "device_class" in p.header]
    names = {device_code(n): n for n in classes}
    return {code: names.get(code, f"unknown {code:08x}") for code in sorted(used)}


def _attributes(plan: Plan, opaque: set[str]) -> dict[str, dict[str, str]]:
    out: dict[str, dict[str, str]] = {
        "weight_sq": {"long_name": "squared L2 norm of the parameters", "units": "1"},
        "device_class": {"long_name": "index into provenance devices", "units": "1"},
    }
    for (split, metric), name in zip(plan.variables, plan.variable_names, strict=True):
        units = "percent" if metric == "accuracy" else "1"
        common = {"units": units, "split": split}
        if name in plan.pointwise:
            out |= _pointwise_attributes(plan.pointwise[name], split, metric, plan)
            continue
        note = " (mean over batches, no standard error)" if name in opaque else ""
        out[name] = {**common, "metric": metric, "long_name": f"{split} {metric}{note}"}
        for suffix, what in (
            ("se", "standard error"),
            ("diff_se", "standard error of the difference to the centre"),
        ):
            text = f"{what} of {split} {metric}"
            out[f"{name}_{suffix}"] = {**common, "long_name": text, "replicate": "samples"}
    for axis, recipe in plan.directions.items():
        out[axis] = {
            "direction": describe_recipe(recipe),
            "long_name": f"offset along direction {axis}",
            "norm": repr(float(plan.facts["axes"][axis]["norm"])),
        }
        if axis not in plan.moving:
            out[axis] |= {"long_name": describe_recipe(recipe), "kind": str(recipe["kind"])}
            del out[axis]["norm"]
        if recipe["kind"] == "layer":
            out[axis]["layers"] = " ".join(plan.facts["layers"])
    return out


def _pointwise_attributes(
    pointwise: Pointwise, split: str, variable: str, plan: Plan
) -> dict[str, dict[str, str]]:
    name = f"{split}_{variable}"
    what = next(v for v in pointwise.outputs if v.name == variable)
    common = {"units": what.units, "split": split}
    attributes = {**common, "metric": pointwise.name, "long_name": f"{split} {what.long_name}"}
    if not pointwise.sampled:
        attributes["moved"] = plan.facts["curvature"]
    if pointwise.replicate:
        attributes["replicate"] = pointwise.replicate
    error = {**common, "long_name": f"standard error of {split} {what.long_name}"}
    return {name: attributes, f"{name}_se": {**error, "replicate": "samples"}}


def _trajectory(values: dict[str, FloatArray], rounds: Rounds, plan: Plan) -> Trajectory | None:
    if not plan.steps:
        return None
    numbers = rounds.step_numbers()
    spots = plan.facts["projections"]
    return Trajectory(
        np.array([p["offsets"] for p in spots], dtype=np.float64),
        np.array([p["residual"] for p in spots], dtype=np.float64),
        np.array([p["in_plane"] for p in spots], dtype=np.float64),
        {n: values[n][numbers] for n in plan.variable_names},
        tuple(s["label"] for s in plan.steps),
    )


def _provenance(
    folder: RunFolder,
    plan: Plan,
    seconds: float,
    report: Report,
    classes: dict[int, str],
    sampling: dict[str, Any],
    devices: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    # A class without a row here has no part in the picture.
    used = {name: devices[name] for name in classes.values() if name in devices}
    precision = coarsest(plan, used)
    left_out = list(dict.fromkeys(p.name for p in plan.pointwise.values()))
    return {
        "plan": {f: getattr(plan, f) for f in plan.__dataclass_fields__},
        "plan_sha256": plan.digest,
        "versions": versions(),
        "devices": devices,
        "device_classes": [classes[c] for c in sorted(classes)],
        "numerics": {
            "precision": precision,
            "asked": plan.evaluate["precision"],
            "sums": "float64",
            "agreement_across_classes": across_classes(precision),
        },
        "seconds": f"{seconds:.3f}",
        "audit": {**report.audit, **({"left_out": left_out} if left_out else {})},
        "failures": report.failed,
        "sampling": sampling,
        "caption": caption(
            plan,
            used or devices,
            [*variates.words(sampling), *notes(folder, plan.digest)],
            report.audit,
            " and ".join(plan.variable_names[k] for k in audited_variables(plan)),
        ),
    }


def failed_points(folder: RunFolder) -> list[int]:
    """Return the numbers of points that failed, have not succeeded since and are not asked for.

    Several ranks may ask for them again at once: what one of them asked is pending, not failed.
    """
    _, rounds, committed = read_run(folder)
    failed = (committed.standing()[0] == Status.FAILED).any(axis=1) & rounds.required
    if rounds.asked_again:
        failed[rounds.first_asked[~committed.done.all(axis=1)]] = False
    return [int(p) for p in np.flatnonzero(failed)]

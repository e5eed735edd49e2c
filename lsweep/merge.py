"""Merge: from committed rows to a surface; the same parts give the same bytes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.caption import caption, describe_recipe, title
from lsweep.committed import read_run
from lsweep.errors import LsweepError
from lsweep.files import read_json, readable
from lsweep.folder import RunFolder
from lsweep.machine import versions
from lsweep.parts import Kind, Part, device_code
from lsweep.plan import Plan
from lsweep.rounds import Rounds
from lsweep.sums import WD, WV, WW, WWD, WWDD, WWV, WWVV, W, standard_error
from lsweep.surface import Status, Surface, Trajectory

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
AUDIT_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "tf32": 0.1, "bfloat16": 0.5, "float16": 0.5}
ACROSS_CLASSES = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 5e-2}


@dataclass
class Report:
    """What merging found.

    Attributes:
        points: how many points the surface has.
        missing: how many of them are pending.
        failed: reason -> how many points.
        nonfinite: how many are NaN or infinite, a result like others.
        conflicts: points whose rows disagree: non-determinism, or a device that errs.
        damaged: part name -> what is wrong with it.
        audit: how far second evaluations are from the first.
    """

    points: int = 0
    missing: int = 0
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
        if self.missing:
            out.append(f"{self.missing} of {self.points} points are missing")
        for reason, count in self.failed.items():
            out.append(f"{count} points failed: {reason}")
        if self.nonfinite:
            out.append(f"{self.nonfinite} points are NaN or infinite: results, masked in pictures")
        if self.conflicts:
            out.append(f"{self.conflicts} points were computed twice with different values")
        if self.audit.get("failed"):
            out.append(f"audit: {self.audit['failed']:.0f} points could not be evaluated again")
        if self.audit.get("one_finite"):
            out.append(
                f"audit: {self.audit['one_finite']:.0f} points are finite in one evaluation and "
                "not in the other: do not trust these values"
            )
        if self.audit.get("largest_relative", 0.0) > self.audit.get("tolerance", math.inf):
            out.append(
                f"audit: a second evaluation differs by {self.audit['largest_relative']:.1e} "
                f"(relative), more than {self.audit['tolerance']:.0e}: do not trust these values"
            )
        out += [f"{name}: {what}" for name, what in self.damaged.items()]
        return out


def merge(folder: RunFolder) -> tuple[Surface, Report]:
    """Merge all that is committed; points without a row are pending.

    Raises:
        LsweepError: this is no run.
        DamagedFile: its plan or a round was altered.
    """
    plan, rounds, committed = read_run(folder)
    report = Report(damaged=damage(committed.parts))
    best = _best_rows(committed.parts, rounds, plan, report)
    lattice = rounds.last.lattice
    numbers = rounds.numbers_of(lattice)
    sums, status, failed_rows = _combine(best, numbers, plan)
    shape = lattice.shape
    opaque = _opaque(folder, committed.parts)
    values = _variables(sums, plan, opaque)
    values = {n: np.where(status == Status.FAILED, np.nan, v) for n, v in values.items()}
    finite = np.logical_and.reduce([np.isfinite(values[n]) for n in plan.variable_names])
    # The value decides, not its slices: one whose labels are all ignored has a mean of 0/0.
    computed = (status == Status.OK) | (status == Status.NONFINITE)
    status[computed] = np.where(finite[computed], Status.OK, Status.NONFINITE)
    values["weight_sq"] = _weight_squares(plan, lattice.offsets(np.arange(len(lattice))))
    classes = _classes(committed.parts, best, numbers)
    if len(classes) > 1:
        values["device_class"] = _class_of_points(best, numbers, sorted(classes))
    report.points = len(lattice)
    report.missing = int((status == Status.PENDING).sum())
    report.nonfinite = int((status == Status.NONFINITE).sum())
    report.failed = _reasons(failed_rows, best)
    report.audit = _audit(committed.parts, best, rounds, plan)
    surface = Surface(
        lattice.axes,
        {n: v.reshape(shape) for n, v in values.items()},
        status.reshape(shape),
        _attributes(plan, opaque),
        _trajectory(best, rounds, plan, opaque),
        _provenance(folder, plan, committed.parts, report, classes),
        title(plan),
        f"lsweep {versions()['lsweep']}: merge of plan {plan.digest[:12]}",
    )
    return surface, report


def _opaque(folder: RunFolder, parts: list[Part]) -> set[str]:
    """Return the variables that are batch means; recorded twice, as one record may be lost."""
    names = {v for p in parts for v in p.header.get("opaque", "").split()}
    return names.union(*(value["opaque"] for value in readable(folder.all_devices())))


def damage(parts: list[Part]) -> dict[str, str]:
    """Return what is wrong with parts, by name."""
    out = {}
    for p in parts:
        if p.salvaged:
            out[p.path.name] = f"HDF5 cannot open it; {len(p.rows)} rows were salvaged"
        elif p.damaged:
            out[p.path.name] = f"{p.damaged} rows fail their checksum; they count as not computed"
    return out


@dataclass
class _Best:
    """One row per (point, slice) that has any: arrays sorted by number."""

    sums: FloatArray  # (points, slices, V, 8); NaN where there is no row
    status: npt.NDArray[np.uint8]  # (points, slices)
    device: npt.NDArray[np.uint32]  # (points, slices)
    reason: dict[int, str]


def _best_rows(parts: list[Part], rounds: Rounds, plan: Plan, report: Report) -> _Best:
    shape = (rounds.total, plan.slices)
    sums = np.full((*shape, len(plan.variables), 8), np.nan)
    status = np.zeros(shape, dtype=np.uint8)
    device = np.zeros(shape, dtype=np.uint32)
    batch = np.zeros(shape, dtype=np.uint32)
    best = _Best(sums, status, device, {})
    conflicts: set[int] = set()
    tolerance = ACROSS_CLASSES[plan.evaluate["precision"]]
    for part in parts:
        rows = part.rows[part.rows["kind"] == Kind.VALUE]
        rows = rows[(rows["point"] < rounds.total) & (rows["slice"] < plan.slices)]
        point = rounds.first_asked[rows["point"].astype(np.int64)]
        slice_ = rows["slice"].astype(np.int64)
        sizes = device_code(part.header.get("batch_sizes", ""))
        there, new = status[point, slice_], rows["status"]
        # ok is 1, nonfinite 2, failed 3: a lower status is the better row; the first part wins.
        for i in np.flatnonzero((there > 0) & (there < Status.FAILED) & (new < Status.FAILED)):
            p, s = point[i], slice_[i]
            same = rows["device"][i] == device[p, s] and batch[p, s] == sizes
            a, b = sums[p, s], rows["sums"][i]
            if not (_identical(a, b) if same else _close(a, b, tolerance)):
                conflicts.add(int(p))
        better = (there == 0) | (new < there)
        # Within one part a point may stand twice; the later row of equal status must not win.
        order = np.flatnonzero(better)[::-1]
        order = order[np.argsort(-new[order].astype(np.int64), kind="stable")]
        p, s = point[order], slice_[order]
        sums[p, s], status[p, s], device[p, s] = (
            rows["sums"][order],
            new[order],
            rows["device"][order],
        )
        batch[p, s] = sizes
        for i in np.flatnonzero(new == Status.FAILED):
            best.reason.setdefault(int(point[i]), part.reason(rows[i]))
    report.conflicts = len(conflicts)
    return best


def _identical(a: FloatArray, b: FloatArray) -> bool:
    return bool(np.array_equal(a, b, equal_nan=True))


def _close(a: FloatArray, b: FloatArray, tolerance: float) -> bool:
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = a[:, WV] / a[:, W], b[:, WV] / b[:, W]
    return bool(np.allclose(x, y, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True))


def _combine(
    best: _Best, numbers: IntArray, plan: Plan
) -> tuple[FloatArray, npt.NDArray[np.uint8], IntArray]:
    """Sum the slices of each point in slice order, so that cutting the data changes nothing."""
    known = numbers >= 0
    at = np.where(known, numbers, 0)
    slices = best.status[at]
    status = slices.max(axis=1)
    status[(slices == Status.PENDING).any(axis=1) | ~known] = Status.PENDING
    status[(slices == Status.FAILED).any(axis=1) & known] = Status.FAILED
    total = best.sums[at, 0]
    for s in range(1, plan.slices):
        total = total + best.sums[at, s]
    total[(status == Status.PENDING) | (status == Status.FAILED)] = np.nan
    return total, status, numbers[status == Status.FAILED]


def _variables(sums: FloatArray, plan: Plan, opaque: set[str]) -> dict[str, FloatArray]:
    values, errors = {}, {}
    for k, name in enumerate(plan.variable_names):
        s = sums[:, k]
        with np.errstate(invalid="ignore", divide="ignore"):
            values[name] = s[:, WV] / s[:, W]
        if name in opaque:
            continue
        errors[f"{name}_se"] = standard_error(s[:, W], s[:, WW], s[:, WV], s[:, WWV], s[:, WWVV])
        errors[f"{name}_diff_se"] = standard_error(
            s[:, W], s[:, WW], s[:, WD], s[:, WWD], s[:, WWDD]
        )
    return values | errors


def _weight_squares(plan: Plan, offsets: FloatArray) -> FloatArray:
    """||θ + Σ offset·d||² = ||θ||² + 2 Σ offset <θ, d> + Σ Σ offset offset' <d, d'>."""
    products = plan.facts["weight_sq"]
    linear, square = np.array(products["linear"]), np.array(products["square"])
    return np.asarray(
        products["origin"]
        + 2 * offsets @ linear
        + np.einsum("pa,ab,pb->p", offsets, square, offsets)
    )


def _reasons(failed: IntArray, best: _Best) -> dict[str, int]:
    counted = Counter(best.reason.get(int(n), "reason not recorded") for n in failed)
    return dict(sorted(counted.items()))


def _audit(parts: list[Part], best: _Best, rounds: Rounds, plan: Plan) -> dict[str, float]:
    """Compare the first variable of audited points with their value."""
    pairs, failed = [], 0
    for part in parts:
        for row in part.rows[part.rows["kind"] == Kind.AUDIT]:
            if row["point"] >= rounds.total or row["slice"] >= plan.slices:
                continue
            failed += int(row["status"] == Status.FAILED)
            p = rounds.first_asked[int(row["point"])]
            a, b = best.sums[p, row["slice"], 0], row["sums"][0]
            with np.errstate(invalid="ignore", divide="ignore"):
                pairs.append((a[WV] / a[W], b[WV] / b[W], row["status"] == Status.OK))
    values = np.array([(x, y) for x, y, ok in pairs if ok]).reshape(-1, 2)
    finite = np.isfinite(values)
    both = values[finite.all(axis=1)]
    difference = np.abs(both[:, 0] - both[:, 1])
    # Near a minimum of zero a relative error says nothing: a thousandth of the usual value counts.
    size = np.abs(both[:, 1])
    floor = max(1e-3 * float(np.median(size)), 1e-300) if len(size) else 1.0
    relative = difference / np.maximum(size, floor)
    if not pairs:
        return {}
    return {
        "points": float(len(values)),
        "failed": float(failed),
        "one_finite": float((finite[:, 0] != finite[:, 1]).sum()),
        "largest_absolute": float(difference.max(initial=0.0)),
        "largest_relative": float(relative.max(initial=0.0)),
        "median_relative": float(np.median(relative)) if len(relative) else 0.0,
        "tolerance": AUDIT_TOLERANCE[plan.evaluate["precision"]],
    }


def _classes(parts: list[Part], best: _Best, numbers: IntArray) -> dict[int, str]:
    used = set(np.unique(best.device[numbers[numbers >= 0]]).tolist()) - {0}
    names = {
        device_code(p.header["device_class"]): p.header["device_class"] for p in parts if p.header
    }
    return {code: names.get(code, f"unknown {code:08x}") for code in sorted(used)}


def _class_of_points(best: _Best, numbers: IntArray, codes: list[int]) -> FloatArray:
    device = best.device[np.where(numbers >= 0, numbers, 0), 0]
    out = np.full(len(numbers), np.nan)
    for i, code in enumerate(codes):
        out[(device == code) & (numbers >= 0)] = i
    return out


def _attributes(plan: Plan, opaque: set[str]) -> dict[str, dict[str, str]]:
    out: dict[str, dict[str, str]] = {
        "weight_sq": {"long_name": "squared L2 norm of the parameters", "units": "1"},
        "device_class": {"long_name": "index into provenance devices", "units": "1"},
    }
    for (split, metric), name in zip(plan.variables, plan.variable_names, strict=True):
        units = "percent" if metric == "accuracy" else "1"
        common = {"units": units, "split": split}
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
    return out


def _trajectory(best: _Best, rounds: Rounds, plan: Plan, opaque: set[str]) -> Trajectory | None:
    if not plan.steps:
        return None
    sums, _, _ = _combine(best, rounds.step_numbers(), plan)
    found = _variables(sums, plan, opaque)
    spots = plan.facts["projections"]
    return Trajectory(
        np.array([p["offsets"] for p in spots], dtype=np.float64),
        np.array([p["residual"] for p in spots], dtype=np.float64),
        np.array([p["in_plane"] for p in spots], dtype=np.float64),
        {n: found[n] for n in plan.variable_names},
        tuple(s["label"] for s in plan.steps),
    )


def _provenance(
    folder: RunFolder, plan: Plan, parts: list[Part], report: Report, classes: dict[int, str]
) -> dict[str, Any]:
    devices = {}
    for path in folder.all_devices():
        try:
            value = read_json(path)
        except LsweepError as e:
            report.damaged[path.name] = str(e)
            continue
        devices[value["class"]] = {
            k: value[k]
            for k in ("device", "batch_sizes", "threads", "versions", "samples", "centre")
        } | {"batch_norm": value["batch_norm"], "seconds_per_point": value["seconds_per_point"]}
    seconds = float(sum(p.rows["seconds"].sum() for p in parts))
    return {
        "plan": {f: getattr(plan, f) for f in plan.__dataclass_fields__},
        "plan_sha256": plan.digest,
        "versions": versions(),
        "devices": devices,
        "device_classes": [classes[c] for c in sorted(classes)],
        "numerics": {
            "precision": plan.evaluate["precision"],
            "sums": "float64",
            "agreement_across_classes": ACROSS_CLASSES[plan.evaluate["precision"]],
        },
        "seconds": f"{seconds:.3f}",
        "audit": report.audit,
        "failures": report.failed,
        "caption": caption(plan, devices),
    }


def failed_points(folder: RunFolder) -> list[int]:
    """Return the numbers of points that failed, have not succeeded since and are not asked for.

    Several ranks may ask for them again at once: what one of them asked is pending, not failed.
    """
    plan, rounds, committed = read_run(folder)
    best = _best_rows(committed.parts, rounds, plan, Report())
    pending = set(rounds.first_asked[~committed.done.all(axis=1)].tolist())
    asked = np.unique(rounds.first_asked)
    bad = [int(p) for p in asked if (best.status[p] == Status.FAILED).any()]
    return [p for p in bad if p not in pending]

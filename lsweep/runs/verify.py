"""Verify: the integrity of every file of a run, and on request of the data it was computed from."""

from __future__ import annotations

from dataclasses import dataclass, field

import h5py
import numpy as np

from lsweep.errors import LsweepError
from lsweep.merging.merge import merge
from lsweep.outcomes.committed import Committed
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder
from lsweep.storage.stored import read_arrays
from lsweep.surfaces.differing import difference
from lsweep.surfaces.surface import Surface


@dataclass
class Findings:
    """What verifying found: ``problems`` for damage, ``notes`` for what is merely worth knowing."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: int = 0


def verify(folder: RunFolder, data: bool = False, trust: bool = False) -> Findings:
    """Check the checksum of every file, that they belong together, and that rows agree.

    Args:
        folder: the run.
        data: also read all data and compare with what the first worker saw (imports the factory).
        trust: import a factory that belongs to another user.

    Raises:
        LsweepError: this is no run.
    """
    found = Findings()
    try:
        plan = Plan.read(folder)
        found.checked += 1
        rounds = Rounds.read(folder, plan)
        found.checked += len(rounds.all)
    except LsweepError as e:
        if not folder.exists:
            raise
        found.problems.append(f"{e}; nothing else can be checked without it")
        return found
    others = [
        *folder.all_devices(),
        *folder.all_workers(),
        *folder.all_submissions(),
        *folder.all_leases(),
    ]
    others += [p for p in (folder.source, folder.measured, folder.invariance) if p.exists()]
    for path in others:
        found.checked += 1
        try:
            value = read_json(path)
            if value.get("plan", plan.digest) != plan.digest:
                raise LsweepError(f"{path} belongs to another plan")
        except LsweepError as e:
            found.problems.append(f"{e}; it can be deleted, it is made again")
    _check_code(folder, plan, found)
    _check_directions(folder, plan, found)
    _check_stored(folder, plan, found)
    committed = Committed.read(folder, plan, rounds)
    found.checked += len(committed.readers)
    for name, what in committed.damage.items():
        found.problems.append(f"{name}: {what}; 'lsweep run' computes what is lost")
    done, total = committed.share
    if done < total:
        found.notes.append(f"{total - done} of {total} points have no row yet")
    if rounds.refining:
        found.notes.append("the refinement is open: more points will be asked")
    merged, report = merge(folder)
    if report.conflicts:
        found.problems.append(
            f"{report.conflicts} points were computed twice with different values: "
            "non-determinism, or a device that errs"
        )
    if folder.surface.exists():
        found.checked += 1
        _check_surface(folder, plan, merged, found)
    if data:
        _check_data(folder, plan, found, trust)
    return found


def _check_code(folder: RunFolder, plan: Plan, found: Findings) -> None:
    from hashlib import sha256

    where = plan.problem["factory"].rpartition(":")[0]
    if not plan.problem["code"]:
        return
    copy = folder.factory(where)
    found.checked += 1
    if not copy.is_file():
        found.problems.append(f"{copy} is missing: put the planned factory file there")
    elif sha256(copy.read_bytes()).hexdigest() != plan.problem["code"]:
        found.problems.append(f"{copy} is not the factory file that was planned")


def _check_directions(folder: RunFolder, plan: Plan, found: Findings) -> None:
    """Compare directions.h5 with the plan, which holds the same norms and fingerprints."""
    if not folder.directions.exists():
        return
    found.checked += 1
    try:
        with h5py.File(folder.directions, "r", locking="best-effort") as f:
            same = f.attrs["plan"] == plan.digest.encode()
            for name in ("gram", "cosines"):
                same &= np.array_equal(f[name][()], plan.facts[name])
            for axis in plan.axes:
                g, facts = f[axis], plan.facts["axes"][axis]
                same &= g.attrs["sha256"] == plan.directions[axis]["sha256"].encode()
                same &= all(g.attrs[k] == facts[k] for k in ("norm", "zero_filters"))
                same &= len(set(g["tensor_names"][()])) == len(g["tensor_norms"])
                same &= bool(np.isclose(np.linalg.norm(g["tensor_norms"][()]), facts["norm"]))
    except Exception:  # HDF5 reports damage as almost any exception
        same = False
    if not same:
        found.problems.append(
            f"{folder.directions} is damaged or belongs to another plan; it can be deleted, no "
            "value is computed from it"
        )


def _check_stored(folder: RunFolder, plan: Plan, found: Findings) -> None:
    """Read the derived directions, which cannot be made again."""
    for axis in plan.derived:
        found.checked += 1
        try:
            read_arrays(folder, axis, plan.directions[axis]["stored"])
        except LsweepError as e:
            found.problems.append(str(e))


def _check_surface(folder: RunFolder, plan: Plan, merged: Surface, found: Findings) -> None:
    try:
        surface = Surface.load(folder.surface)
    except LsweepError as e:
        found.problems.append(f"{e}; 'lsweep merge' makes it again")
        return
    if surface.provenance.get("plan_sha256") != plan.digest:
        found.problems.append(f"{folder.surface} belongs to another plan")
        return
    if difference(surface, merged):
        found.notes.append(f"{folder.surface.name} is older than the parts: 'lsweep merge' it")


def _check_data(folder: RunFolder, plan: Plan, found: Findings, trust: bool) -> None:
    from lsweep.preparing.restoring import load_problem

    problem, _ = load_problem(folder, plan, trust=trust)
    for path in folder.all_devices():
        try:
            value = read_json(path)
        except LsweepError:
            continue  # reported above
        for split, there in value["data"].items():
            found.checked += 1
            here = problem.splits[split].full_digest(value["batch_sizes"][split])
            if here != there:
                found.problems.append(
                    f"the {split} data is not what {value['class']} evaluated: {here[:12]}… now, "
                    f"{there[:12]}… then"
                )

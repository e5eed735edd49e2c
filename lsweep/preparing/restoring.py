"""Restoring: from a run back to its settings, problem and directions, checked against its plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from lsweep.axes.directions import Directions, make_directions
from lsweep.axes.vectors import Origin
from lsweep.errors import DamagedFile, LsweepError, PlanChanged
from lsweep.hosts.machine import refuse_foreign
from lsweep.invariance.gauge import fixed_origin, moved_by
from lsweep.plans.plan import LIVE, Plan
from lsweep.plans.rounds import Rounds
from lsweep.plans.settings import Evaluation, Settings, Track
from lsweep.preparing.derived import MADE, read_derived
from lsweep.problems.factory import file_digest
from lsweep.problems.problem import Problem, make_problem
from lsweep.problems.subsets import described, subsampled
from lsweep.problems.weights import describe, fingerprint, load_matching
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import there
from lsweep.storage.tables import build

QUICK = 5.0  # seconds in which a factory loads nothing large
_RESTORE = "restore it, or plan a new run"
_OTHER = (
    "the factory makes another network each time it is called (set a seed or load a checkpoint), "
    "or its checkpoint was replaced (put it back)"
)


def base_of(folder: RunFolder) -> Path:
    """Return the folder that relative paths of a run refer to, also when it moved with the run.

    Raises:
        LsweepError: it is gone, or the run's note of it is damaged.
    """
    if not there(folder.source):
        return folder.root.absolute().parent
    source = read_json(folder.source)
    try:
        base = Path(source["base"])
        beside = folder.root.absolute().joinpath(source["beside"])
    except (KeyError, TypeError):
        raise DamagedFile(f"{folder.source} does not say where the run was planned") from None
    if base.is_dir() or not beside.is_dir():
        return base
    return beside.resolve()


def kept_code(folder: RunFolder, plan: Plan) -> Path | None:
    """Return the run's own copy of the factory's file; None for an importable module.

    Raises:
        PlanChanged: it is not what was planned.
    """
    file, _, _ = plan.problem["factory"].rpartition(":")
    if not file.endswith(".py"):
        return None
    code = folder.factory(file)
    if file_digest(code) != plan.problem["code"]:
        raise PlanChanged(
            f"{code} is not the factory file that was planned: put back the original, or plan "
            "a new run",
            "problem.code",
        )
    return code


def settings_of(folder: RunFolder, plan: Plan) -> Settings:
    """Return settings that make the plan's directions again, with the newest round's grid."""
    rounds = Rounds.read(folder, plan)
    recipes = {
        axis: {k: v for k, v in recipe.items() if k not in MADE and v is not None}
        for axis, recipe in plan.directions.items()
    }
    grid = {
        n: {"range": [Decimal(low), Decimal(high)], "count": count}
        for n, (low, high, count) in rounds.last.grid.items()
    }
    table: dict[str, Any] = {
        "problem": {"factory": plan.problem["factory"], "options": plan.problem["options"]},
        "grid": grid,
        "directions": recipes,
    }
    settings = Settings.from_table(table, str(folder.plan))
    evaluation = build(
        Evaluation, {k: v for k, v in plan.evaluate.items() if v is not None}, "plan"
    )
    track = Track(tuple(plan.facts["track"])) if plan.facts["track"] else None
    return dataclasses.replace(settings, evaluate=evaluation, trajectory=track)


def _data_fields(plan: Plan, problem: Problem) -> Iterator[tuple[str, str, str]]:
    """Yield (field, planned, present) of each split's data, and of the subset drawn from it."""
    for s, known in plan.data.items():
        if s in problem.splits:
            here = described(problem.splits[s])
            for field in known:
                yield f"data.{s}.{field}", str(known[field]), str(here.get(field))


def _step_fields(
    plan: Plan, directions: Directions, origin: Origin
) -> Iterator[tuple[str, str, str]]:
    """Yield (field, planned, present) of the checkpoints that are shown on the plane."""
    labels = [[s["label"] for s in plan.steps], [s.label for s in directions.steps]]
    yield "steps", ", ".join(labels[0]), ", ".join(labels[1])
    for known, step in zip(plan.steps, directions.steps, strict=False):
        state = load_matching(step.path, origin.everything)
        yield f"steps.{step.label}.sha256", known["sha256"], fingerprint(state)


def require_repeatable(folder: RunFolder, plan: Plan, problem: Problem, trust: bool) -> None:
    """Call a factory once more, for a process that both plans and works compares with nobody.

    Where something is committed, whoever planned or came later has compared; a child's origin is
    that of its parent. What takes long to load is large, and is not loaded twice.

    Raises:
        PlanChanged: it makes another network or other data each time.
    """
    child = RunFolder(folder.root.parent.parent).measures == folder.root.parent
    if problem.source is None or problem.seconds > QUICK or child or folder.all_parts():
        return
    again = make_problem(problem.source, base_of(folder), kept_code(folder, plan), trust)
    models = (problem.model, again.model)
    if len({fingerprint(Origin.of(model).everything) for model in models}) > 1:
        raise _another_network(folder)
    for field, planned, here in _data_fields(plan, subsampled(again, plan.evaluate)):
        if planned != here:
            raise PlanChanged(
                f"{folder.root}: the factory makes other {field.split('.')[1]} data each time it "
                "is called: set a seed for what draws, splits or shuffles it; nothing was computed "
                "there yet",
                field,
            )


def _another_network(folder: RunFolder) -> PlanChanged:
    empty = "" if folder.all_parts() else "; nothing was computed there yet"
    return PlanChanged(f"{folder.root}: {_OTHER}{empty}", "origin.sha256")


def load_problem(
    folder: RunFolder, plan: Plan, problem: Problem | None = None, trust: bool = False
) -> tuple[Problem, Directions]:
    """Make a run's problem and directions, and check that they are the plan's.

    Raises:
        PlanChanged: weights, directions, data or code are not those that were planned.
        LsweepError: the run was made from a live problem, or its factory fails.
    """
    if problem is None:
        if plan.problem["factory"] == LIVE:
            raise LsweepError(
                f"{folder.root} was made from a live model, which no other process can load: "
                "call lsweep.sweep(problem, run=…) again, or use Problem.from_factory"
            )
        for file in (folder.plan, folder.source):
            refuse_foreign(file, trust)
        settings = settings_of(folder, plan)
        code = kept_code(folder, plan)
        problem = make_problem(settings.problem, base_of(folder), code, trust)
    else:
        settings = settings_of(folder, plan)
    problem = subsampled(problem, plan.evaluate)
    origin, factors = fixed_origin(settings, problem, plan.facts.get("gauge"))
    stored = read_derived(folder, plan)
    directions = make_directions(settings, origin, base_of(folder), plan.facts["axes"], stored)
    directions = dataclasses.replace(directions, origin=moved_by(origin, factors))
    for field, planned, here in (
        ("origin.sha256", plan.origin["sha256"], describe(origin.everything)["sha256"]),
        *(
            (
                f"directions.{axis}.sha256",
                plan.directions[axis]["sha256"],
                directions.fingerprint(axis),
            )
            for axis in directions.axes
        ),
        *_data_fields(plan, problem),
        *_step_fields(plan, directions, origin),
    ):
        if planned != here and field == "origin.sha256":  # in words that all workers share
            raise _another_network(folder)
        if planned != here:
            raise PlanChanged(
                f"{folder.root}: {field} is {here[:20]}… now, {planned[:20]}… was planned: the "
                f"{field.split('.')[0]} changed since; {_RESTORE}",
                field,
            )
    return problem, directions

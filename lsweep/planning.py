"""From a sweep and a problem to a frozen plan, and from a run back to its problem."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from lsweep.asking import ask_grid
from lsweep.derived import derive
from lsweep.differentiating import check_pointwise
from lsweep.direction_file import write_directions
from lsweep.directions import Directions, make_directions
from lsweep.errors import DamagedFile, LsweepError, PlanChanged, nearest
from lsweep.factory import factory_file, file_digest
from lsweep.files import publish, read_json, readable, replace, sealed
from lsweep.folder import RunFolder
from lsweep.insist import read, there
from lsweep.machine import refuse_foreign
from lsweep.plan import Plan
from lsweep.pointwise import POINTWISE
from lsweep.preflight import check_expected, probe
from lsweep.problem import Problem, make_problem
from lsweep.rounds import Rounds
from lsweep.settings import DERIVED, Evaluation, Settings, Track
from lsweep.stored import digest_of, read_arrays, store_arrays
from lsweep.subsets import described, subsampled
from lsweep.tables import build, plain
from lsweep.trajectory import project
from lsweep.vectors import Origin, dot
from lsweep.weights import State, describe, fingerprint, load_matching

LIVE = "live:problem"
BATCH_NORM_BATCH = 128
LARGE = 2**30  # bytes of a split that are read as seldom as may be
PROBE_TOLERANCE, PROBE_FLOOR = 1e-3, 1e-3  # other machines round differently, most near zero
_MADE = ("sha256", "stored")  # of a direction: what was made by its recipe
_RESTORE = "restore it, or plan a new run"
_REMEDIES = {
    "origin.sha256": "a factory must load the same weights each time: if it trains, save them first"
}


@dataclass(frozen=True)
class Planned:
    """A run that is ready to be worked on."""

    folder: RunFolder
    plan: Plan
    rounds: Rounds


def make_plan(
    settings: Settings,
    problem: Problem,
    base: Path,
    known: dict[str, Any] | None = None,
    code: Path | None = None,
    stored: dict[str, State] | None = None,
) -> tuple[Plan, Directions]:
    """Find out all that a value depends on.

    Args:
        settings: what is asked for.
        problem: made by its factory, or live.
        base: folder that relative paths refer to.
        known: ``facts`` of a plan made before, whose coefficients are kept.
        code: the factory's file, where it is not the one below ``base``.
        stored: axis -> tensors of its derived directions; by default they are computed.

    Raises:
        LsweepError: a split, a metric, a checkpoint or a direction is wrong.
    """
    evaluate = settings.evaluate
    for split in evaluate.splits:
        if split not in problem.splits:
            raise LsweepError(f"no data split {split!r}{nearest(split, problem.splits)}")
    problem = subsampled(problem, dataclasses.asdict(evaluate))
    for split in evaluate.splits:
        samples = problem.splits[split].samples
        if evaluate.slices > 1 and (samples is None or evaluate.slices > samples):
            have = "batches of its own" if samples is None else f"{samples} samples"
            raise LsweepError(f"slices = {evaluate.slices}: the data split {split!r} has {have}")
    check_pointwise(evaluate.metrics, problem)
    means = [m for m in evaluate.metrics if m not in POINTWISE]
    if problem.forward is None:
        for metric in means:
            if metric not in problem.metric_names:
                raise LsweepError(
                    f"no metric {metric!r}{nearest(metric, [*problem.metric_names, *POINTWISE])}"
                )
    variables = [f"{s}_{m}" for s in evaluate.splits for m in means]
    for name in evaluate.expected:
        if name not in variables:
            raise LsweepError(f"expected.{name}{nearest(name, variables)}")
    origin = Origin.of(problem.model)
    if stored is None:
        derived = derive(settings, problem, origin)
        stored = {axis: d.tensors for axis, d in derived.items()}
        known = {axis: d.facts for axis, d in derived.items()}
    directions = make_directions(settings, origin, base, known, stored)
    steps, projections = [], []
    for step in directions.steps:
        state = load_matching(step.path, origin.everything)
        steps.append({"label": step.label, "sha256": fingerprint(state)})
        projections.append(dataclasses.asdict(project(state, origin, directions.axes)))
    table = plain(dataclasses.asdict(evaluate))
    del table["expected"]  # a check, not something that a value depends on
    if evaluate.batch_norm != "eval" and evaluate.batch_size == "auto":
        table["batch_size"] = BATCH_NORM_BATCH  # batch statistics depend on it, so it is planned
    source = problem.source
    code = code or (factory_file(source, base) if source else None)
    plan = Plan(
        problem={
            "factory": source.factory if source else LIVE,
            "options": plain(source.options) if source else {},
            "code": file_digest(code) if code else None,
        },
        origin=describe(origin.everything),
        directions={
            axis: {
                **plain(dataclasses.asdict(settings.directions[axis])),
                "sha256": directions.fingerprint(axis),
                **({"stored": digest_of(as_arrays(stored[axis]))} if axis in stored else {}),
            }
            for axis in directions.axes
        },
        steps=steps,
        data={s: described(problem.splits[s]) for s in evaluate.splits},
        evaluate=table,
        facts={
            "network": type(problem.model).__name__,
            "parameters": sum(p.numel() for p in origin.parameters.values()),
            "track": list(settings.trajectory.checkpoints) if settings.trajectory else [],
            "axes": {
                axis: {
                    **directions.facts[axis],
                    "norm": d.norm,
                    "zero_filters": d.zero_filters,
                    "ignored": list(d.ignored),
                }
                for axis, d in directions.axes.items()
            },
            "layers": list(directions.layers),
            "curvature": str(directions.curved),
            "curved": _curved_weights(origin, directions),
            "gram": directions.gram.tolist(),
            "cosines": directions.cosines().tolist(),
            "projections": projections,
            "probe": probe(problem, table),
            "large": any(problem.splits[s].bytes > LARGE for s in evaluate.splits),
            "weight_sq": _weight_products(origin, directions),
        },
    )
    return plan, directions


def as_arrays(tensors: State) -> dict[str, npt.NDArray[Any]]:
    """Return tensors as they are stored."""
    return {n: t.cpu().numpy() for n, t in tensors.items()}


def _curved_weights(origin: Origin, directions: Directions) -> int:
    """How many weights derivatives are taken over: the size of the Hessian."""
    names = directions.curved.names if directions.curved else ()
    return sum(origin.parameters[n].numel() for n in names)


def _weight_products(origin: Origin, directions: Directions) -> dict[str, Any] | None:
    """Inner products over parameters alone, from which ||θ||² follows at every point exactly.

    None where directions change along an axis: there are too many of them.
    """
    if directions.family is not None and directions.moving:
        return None
    moved = [d.weights for d in directions.axes.values()]
    return {
        "origin": dot(origin.parameters, origin.parameters),
        "linear": [dot(m, origin.parameters) for m in moved],
        "square": [[dot(a, b) for b in moved] for a in moved],
    }


def plan_run(
    settings: Settings,
    problem: Problem,
    base: Path,
    folder: RunFolder,
    *,
    text: str | None = None,
    unit_points: int | None = None,
    code: Path | None = None,
) -> Planned:
    """Freeze the plan of a run and publish the round that its grid asks for.

    On a run that exists, the plan must be the same; another grid is one more round.

    Args:
        settings: what is asked for.
        problem: made by its factory, or live.
        base: folder that relative paths refer to.
        folder: the run.
        text: of the sweep.toml, to be kept in the run.
        unit_points: points of a unit.
        code: the factory's file, where it is not the one below ``base``.

    Raises:
        PlanChanged: the run holds another plan; the field is named.
        LsweepError: the folder cannot be written, or the settings do not fit the problem.
    """
    existing = Plan.read(folder) if folder.exists else None
    known = existing.facts["axes"] if existing else None
    try:
        stored = _stored(folder, existing, settings) if existing else None
        plan, directions = make_plan(settings, problem, base, known, code, stored)
    except LsweepError as e:
        if existing is not None and not isinstance(e, PlanChanged):
            raise LsweepError(f"{e} ({folder.root} exists and is untouched)") from None
        raise
    if existing is not None:
        existing.require_same(plan, folder)
        _require_same_probe(existing, plan, folder)
        for known_class in readable(folder.all_devices()):
            check_expected(known_class["centre"], settings.evaluate.expected)
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        for axis in plan.derived if existing is None else ():
            store_arrays(folder, axis, as_arrays(directions.axes[axis].tensors))
        plan = plan.freeze(folder)  # first: a planner that is refused must not touch the rest
        _keep_base(folder, base.absolute())
        _keep_source(plan, problem, base, folder, text, code)
        if not folder.directions.exists():
            write_directions(folder, plan, directions)
        grid = directions.grid
        rounds = ask_grid(
            folder,
            plan,
            grid,
            expected=settings.evaluate.expected,
            refine=settings.refine,
            unit_points=unit_points,
        )
    except OSError as e:
        raise LsweepError(f"cannot write the run {folder.root}: {e.strerror or e}") from None
    return Planned(folder, plan, rounds)


def _stored(folder: RunFolder, plan: Plan, settings: Settings | None = None) -> dict[str, State]:
    """Read the derived directions of a run, which are never computed anew.

    Raises:
        PlanChanged: ``settings`` asks for others.
        LsweepError: one is missing or damaged.
    """
    for axis, recipe in settings.directions.items() if settings else ():
        there = {k: v for k, v in plan.directions.get(axis, {}).items() if k not in _MADE}
        if recipe.kind in DERIVED and there != plain(dataclasses.asdict(recipe)):
            raise PlanChanged(
                f"{folder.root} holds another plan: directions.{axis} has another recipe; restore "
                "it, or give a new folder with --run",
                f"directions.{axis}",
            )
    found = {a: read_arrays(folder, a, plan.directions[a]["stored"]) for a in plan.derived}
    return {a: {n: torch.from_numpy(t) for n, t in ts.items()} for a, ts in found.items()}


def _keep_source(
    plan: Plan,
    problem: Problem,
    base: Path,
    folder: RunFolder,
    text: str | None,
    code: Path | None,
) -> None:
    """Copy what the run was made from: only the code that the frozen plan names."""
    if text is not None:
        publish(folder.settings, text.encode())
    code = code or (factory_file(problem.source, base) if problem.source else None)
    if code is not None and file_digest(code) == plan.problem["code"]:
        _keep(folder.factory(code.name), code.read_bytes())


def _require_same_probe(existing: Plan, plan: Plan, folder: RunFolder) -> None:
    """What no digest covers, the loss and the network's code, shows in values on a few samples."""
    there, here = existing.facts["probe"], plan.facts["probe"]
    for name in there if there and here else ():
        a, b = there[name], here[name]
        if (
            a is not None
            and b is not None
            and abs(a - b) > PROBE_TOLERANCE * (abs(a) + PROBE_FLOOR)
        ):
            raise PlanChanged(
                f"{folder.root} holds another plan: {name} of the first samples is {a:.6g} there "
                f"and {b:.6g} now, so the network's code, the loss or the metric changed; restore "
                "it, or give a new folder with --run",
                "problem",
            )


def _keep_base(folder: RunFolder, base: Path) -> None:
    """Note where relative paths start; a run that moved with its sweep.toml starts there anew."""
    beside = os.path.relpath(base, folder.root.absolute())
    _keep(folder.source, sealed({"base": str(base), "beside": beside}))


def _keep(path: Path, data: bytes) -> None:
    # What is there may be damaged, or left by a plan that was never frozen.
    if not publish(path, data) and read(path) != data:
        replace(path, data, sync=True)


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


def settings_of(folder: RunFolder, plan: Plan) -> Settings:
    """Return settings that make the plan's directions again, with the newest round's grid."""
    rounds = Rounds.read(folder, plan)
    recipes = {
        axis: {k: v for k, v in recipe.items() if k not in _MADE and v is not None}
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
        source = factory_file(settings.problem, folder.root)
        code = folder.factory(source.name) if source else None
        if code is not None and file_digest(code) != plan.problem["code"]:
            raise PlanChanged(
                f"{code} is not the factory file that was planned: put back the original, or plan "
                "a new run",
                "problem.code",
            )
        problem = make_problem(settings.problem, base_of(folder), code, trust)
    else:
        settings = settings_of(folder, plan)
    problem = subsampled(problem, plan.evaluate)
    origin = Origin.of(problem.model)
    stored = _stored(folder, plan)
    directions = make_directions(settings, origin, base_of(folder), plan.facts["axes"], stored)
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
        if planned != here:
            raise PlanChanged(
                f"{folder.root}: {field} is {here[:20]}… now, {planned[:20]}… was planned: the "
                f"{field.split('.')[0]} changed since; {_REMEDIES.get(field, _RESTORE)}",
                field,
            )
    return problem, directions

"""From a sweep and a problem to a frozen plan and its first round."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lsweep.axes.direction_file import write_directions
from lsweep.axes.directions import Directions, make_directions
from lsweep.axes.trajectory import project
from lsweep.axes.vectors import Origin, dot
from lsweep.derivatives.curvature import last_layer
from lsweep.derivatives.differentiating import check_pointwise, refused
from lsweep.errors import LsweepError, PlanChanged, nearest
from lsweep.evaluating.preflight import check_expected, probe
from lsweep.invariance.gauge import as_lists, fixed_origin, moved_by
from lsweep.plans.plan import LIVE, Plan
from lsweep.plans.pointwise import POINTWISE
from lsweep.plans.rounds import Rounds
from lsweep.plans.settings import Settings
from lsweep.preparing.derived import as_arrays, derive, read_derived, store_derived
from lsweep.preparing.vacating import vacate
from lsweep.problems.factory import factory_file, file_digest
from lsweep.problems.problem import Problem
from lsweep.problems.subsets import described, subsampled
from lsweep.problems.weights import State, describe, fingerprint, load_matching
from lsweep.refinement.asking import ask_grid
from lsweep.storage.files import publish, readable, replace, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.holding import held
from lsweep.storage.insist import read
from lsweep.storage.stored import digest_of
from lsweep.storage.tables import plain

BATCH_NORM_BATCH = 128
LARGE = 2**30  # bytes of a split that are read as seldom as may be
PROBE_TOLERANCE, PROBE_FLOOR = 1e-3, 1e-3  # other machines round differently, most near zero


@dataclass(frozen=True)
class Planned:
    """A run that is ready to be worked on."""

    folder: RunFolder
    plan: Plan
    rounds: Rounds
    replaced: str = ""  # the field by which another plan differed that stood there, unused


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
    known = known or {}
    axes = known.get("axes")
    origin, factors = fixed_origin(settings, problem, known.get("gauge"))
    start = moved_by(origin, factors)
    if stored is None:
        derived = derive(settings, problem, origin, start)
        stored = {axis: d.tensors for axis, d in derived.items()}
        axes = {axis: d.facts for axis, d in derived.items()}
    directions = make_directions(settings, origin, base, axes, stored)
    directions = dataclasses.replace(directions, origin=start)
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
            **({"weights": "float64"} if _rounded(origin, evaluate.precision) else {}),
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
            **_curved_weights(origin, directions),
            "gram": directions.gram.tolist(),
            "cosines": directions.cosines().tolist(),
            "projections": projections,
            "probe": probe(problem, table),
            "refused": refused(problem),
            "large": any(problem.splits[s].bytes > LARGE for s in evaluate.splits),
            "weight_sq": _weight_products(origin, directions),
            **({"gauge": as_lists(factors)} if factors else {}),
        },
    )
    return plan, directions


def _rounded(origin: Origin, precision: str) -> bool:
    """Whether float64 weights are computed with in less."""
    exact = any(p.dtype == torch.float64 for p in origin.parameters.values())
    return exact and precision != "float64"


def _curved_weights(origin: Origin, directions: Directions) -> dict[str, Any]:
    """How many weights derivatives are taken over, the size of the Hessian; and the last layer."""
    names = directions.curved.names if directions.curved else ()
    shapes = {n: origin.parameters[n].shape for n in names}
    return {"curved": sum(s.numel() for s in shapes.values()), "last_layer": last_layer(shapes)}


def _weight_products(origin: Origin, directions: Directions) -> dict[str, Any]:
    """Inner products over parameters alone, from which ||θ||² follows at every point exactly.

    That of the origin alone where directions change along an axis: there are too many of them.
    """
    if directions.family is not None and directions.moving:
        return {"origin": dot(origin.parameters, origin.parameters)}
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
    known: dict[str, Any] | None = None,
    stored: dict[str, State] | None = None,
    anew: bool = False,
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
        known: facts of another plan with the same origin that this one shares with it: ``gauge``,
            and ``axes`` where its directions are the same.
        stored: axis -> tensors of derived directions that are shared, too.
        anew: replace another plan of which nothing was computed.

    Raises:
        PlanChanged: the run holds another plan; the field is named.
        LsweepError: the folder cannot be written, or the settings do not fit the problem.
    """
    existing = Plan.read(folder) if folder.exists else None
    shared = known, stored
    try:
        if existing:
            known, stored = existing.facts, read_derived(folder, existing, settings)
        plan, directions = make_plan(settings, problem, base, known, code, stored)
        if existing is not None:
            existing.require_same(plan, folder)
            _require_same_probe(existing, plan, folder)
    except PlanChanged as e:
        if not anew or folder.root.resolve() == base.resolve() or not vacate(folder):
            raise
        found = plan_run(
            settings, problem, base, folder,
            text=text, unit_points=unit_points, code=code, known=shared[0], stored=shared[1],
        )  # fmt: skip
        return dataclasses.replace(found, replaced=e.field)
    except LsweepError as e:
        if existing is not None:
            raise LsweepError(f"{e} ({folder.root} exists and is untouched)") from None
        raise
    if existing is not None:
        for known_class in readable(folder.all_devices()):
            check_expected(known_class["centre"], settings.evaluate.expected)
    try:
        with contextlib.ExitStack() as stack:
            folder.root.mkdir(parents=True, exist_ok=True)
            if existing is None:
                store_derived(folder, {a: directions.axes[a].tensors for a in plan.derived})
            try:
                plan = plan.freeze(folder)  # first: who is refused must not touch the rest
                stack.enter_context(held(folder.plan))
                Plan.read(folder).require_same(plan, folder)  # not replaced before it was held
            except PlanChanged:
                if existing is not None:
                    raise
                # Another was first meanwhile: what differs in its last bits on that machine is its.
                return plan_run(
                    settings, problem, base, folder, text=text, unit_points=unit_points, code=code
                )
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

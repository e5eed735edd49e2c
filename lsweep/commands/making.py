"""What each command that makes or works on a run does, from its options to its exit code.

Torch is imported by the commands that compute, not before; arguments are those of
`lsweep.commands.cli`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lsweep.errors import LsweepError
from lsweep.hosts.machine import refuse_foreign
from lsweep.hosts.ranks import Rank, own_rank
from lsweep.hosts.requeue import another_turn, end_of_job
from lsweep.hosts.startup import delay
from lsweep.hosts.stopping import Stop, Stopped
from lsweep.storage.folder import RunFolder
from lsweep.wording import counted
from lsweep.working.role import Role

if TYPE_CHECKING:
    from lsweep.plans.children import Child
    from lsweep.problems.problem import Problem

INTERRUPTED, INCOMPLETE = 130, 3
EDGE = 0.1  # of a range: a centre that is nearer to its end is seen from one side


def run_of(options: Namespace) -> RunFolder:
    """Return the run that a command line means; it need not exist."""
    if options.run is not None:
        return RunFolder(options.run)
    if options.sweep.is_dir():
        return RunFolder(options.sweep)
    return RunFolder(options.sweep.with_name(f"{options.sweep.stem}.run"))


def chosen_code(options: Namespace, folder: RunFolder) -> Path | None:
    """Return the run's copy of the factory's file with ``--kept-code``; None for the TOML's own."""
    if not options.kept_code:
        return None
    from lsweep.plans.plan import Plan
    from lsweep.preparing.restoring import kept_code

    if not folder.exists:
        raise LsweepError(f"--kept-code: {folder.root} is not planned yet and keeps no code")
    return kept_code(folder, Plan.read(folder))


def planned(options: Namespace) -> tuple[RunFolder, Problem | None, str]:
    """Freeze the plan of a TOML, or take the run as it is; ask again for what failed.

    Another plan of which nothing was computed is replaced; not by one rank of several, whose
    factories may each make another network.

    Returns the problem too where it had to be made, so that this process need not make it twice,
    and the digest of the plan.
    """
    from lsweep.plans.plan import Plan

    folder = run_of(options)
    problem = None
    if folder.exists:
        refuse_foreign(folder.plan, options.trust)
    if options.sweep.is_dir() or (folder.exists and not options.sweep.exists()):
        if options.overrides:
            raise LsweepError(f"--set changes a sweep.toml; {options.sweep} is a run, frozen")
        if getattr(options, "kept_code", False):
            raise LsweepError(f"--kept-code: {options.sweep} is a run, which uses its copy anyway")
        plan = Plan.read(folder)
    else:
        from lsweep.plans.settings import Settings

        settings = Settings.from_file(options.sweep, tuple(options.overrides))
        refuse_foreign(options.sweep, options.trust)  # it names the code that is imported
        from lsweep.preparing.planning import plan_run
        from lsweep.problems.problem import make_problem

        base = options.sweep.absolute().parent
        code = chosen_code(options, folder)
        problem = make_problem(settings.problem, base, code, options.trust)
        text = options.sweep.read_text(encoding="utf-8")
        if options.overrides:
            text += "".join(f"\n# --set {o}" for o in options.overrides) + "\n"
        found = plan_run(settings, problem, base, folder, text=text, code=code,
                         unit_points=options.unit_points,
                         anew=getattr(options, "on", "") != "mpi")  # fmt: skip
        plan = found.plan
        if found.replaced:
            print(f"{folder.root} held another plan ({found.replaced} differs); nothing was "
                  "computed there, so this one took its place")  # fmt: skip
    if options.retry_failed:
        _ask_again(folder)
    return folder, problem, plan.digest


def along_eigenvectors(folder: RunFolder) -> dict[str, list[str]]:
    """Return for each axis along an eigenvector what its curvature says of the range asked last."""
    from lsweep.derivatives.quadratic import quadratic_lines
    from lsweep.plans.plan import Plan
    from lsweep.plans.rounds import Rounds

    plan = Plan.read(folder)
    grid, facts = Rounds.read(folder, plan).last.grid, plan.facts["axes"]
    return {
        axis: quadratic_lines(axis, facts[axis], [float(bound) for bound in grid[axis][:2]])
        for axis in plan.axes
        if "eigenvalue" in facts[axis]
    }


def otherwise(folder: RunFolder) -> list[str]:
    """Return lines on what is not as one may think: all samples taken, 0 at an edge, rounding."""
    from lsweep.plans.plan import Plan
    from lsweep.plans.rounds import Rounds

    plan = Plan.read(folder)
    wanted = plan.evaluate["samples"]
    precision = plan.evaluate["precision"]
    rounded = (
        f'the weights are float64, and precision = "{precision}" rounds them: "float64" does not'
    )
    return (
        [rounded] * ("weights" in plan.facts)
        + [
            f"samples = {wanted}: {split} has {data['samples']}, and all of them are taken"
            for split, data in plan.data.items()
            if wanted is not None and "of" not in data
        ]
        + [
            line
            for axis, (low, high, *_) in Rounds.read(folder, plan).last.grid.items()
            if plan.directions[axis]["kind"] in ("random", "hessian")
            and (line := lopsided(axis, float(low), float(high)))
        ]
    )


def lopsided(axis: str, low: float, high: float) -> str:
    """Return a hint where a range leaves out the network's own weights, or has them at an edge.

    >>> lopsided("x", -1, 1), lopsided("x", -0.5, 1), lopsided("x", 0, 1)
    ('', '', '')
    >>> lopsided("x", 0.5, 1)
    "x from 0.5 to 1 leaves out the network's own weights, x = 0: a symmetric range has them inside"
    """
    off = low > 0 or high < 0
    if not off and (low * high == 0 or min(-low, high) > EDGE * (high - low)):
        return ""
    where = "leaves out" if off else "has at its edge"
    return (
        f"{axis} from {low:g} to {high:g} {where} the network's own weights, {axis} = 0: a "
        "symmetric range has them inside"
    )


def wanted_children(options: Namespace) -> list[Child]:
    """Return the children that ``--measures`` names; the cheap ones first.

    Raises:
        LsweepError: there is no such measure, or its options are given without it.
    """
    from lsweep.plans.children import chosen

    if options.measures is not None:
        found = chosen(options.measures)
        if options.to is not None and not any(c.needs for c in found):
            raise LsweepError("--to goes with --measures barrier")
        if options.replicates is not None and not any(c.replicates for c in found):
            raise LsweepError(
                f"--replicates is not for {', '.join(c.name for c in found)}: leave it out"
            )
        return found
    for name in ("replicates", "samples", "to"):
        if getattr(options, name) is not None:
            raise LsweepError(f"--{name} goes with --measures; a sweep's own are in its TOML")
    return []


def planned_children(
    folder: RunFolder,
    wanted: list[Child],
    problem: Problem | None,
    options: Namespace,
    say: Callable[[str], None] = print,
) -> tuple[list[RunFolder], Problem | None]:
    """Plan the child runs of a run, tell what they cost, and ask again for what failed.

    Returns the problem too, as `planned` does.
    """
    if not wanted:
        return [], problem
    from lsweep.preparing.measuring import Parent, cost_lines, passes

    alone = [c for c in wanted if not c.replicates]
    if options.replicates is not None and alone:
        say(f"--replicates is not for {', '.join(c.name for c in alone)}")
    named = {n.strip() for n in options.measures.split(",")}
    parent = Parent.of(folder, problem, options.trust)
    found = []
    for child in wanted:
        try:
            run = parent.plan_child(
                child, options.replicates or 0, options.samples, options.to, say
            )
        except LsweepError as e:
            if child.name in named:
                if child.name in str(e):
                    raise
                raise LsweepError(f"{child.name}: {e}") from None
            say(f"no {child.name}: {e}")  # all that this network has
            continue
        found.append((child, run))
        if options.retry_failed:
            _ask_again(run.folder)
    found.sort(key=lambda pair: passes(*pair))
    say(f"{folder.root}: {counted(len(found), 'child run')} in {folder.measures}")
    for line in cost_lines(found):
        say(f"  {line}")
    return [run.folder for _, run in found], parent.problem


def _ask_again(folder: RunFolder) -> None:
    from lsweep.merging.merge import failed_points
    from lsweep.refinement.asking import ask_again

    ask_again(folder, lambda: failed_points(folder))


def _cost(folder: RunFolder) -> list[str]:
    """Return what evaluating what is missing takes: passes, and time where a device is known."""
    from lsweep.outcomes.committed import read_run
    from lsweep.outcomes.frozen import frozen
    from lsweep.plans.pointwise import POINTWISE
    from lsweep.runs.display import duration

    plan, rounds, committed = read_run(folder)
    done, _ = committed.share
    many = [m for m in plan.evaluate["metrics"] if m in POINTWISE]
    more = f" and many more for {', '.join(many)}" if many else ""
    missing = rounds.foreseen - done / plan.slices
    out = [f"about {missing:.0f} passes over the data are missing, one a point{more}"]
    for known in frozen(folder, plan, {}).values():
        one = float(known["seconds_per_point"])
        out.append(f"{'at least ' if many else ''}{duration(missing * one)} of one worker on "
                   f"{known['device']}, at {1e3 * one:.3g} ms a point")  # fmt: skip
    if committed.complete:
        return ["all of it is evaluated"]
    unknown = "; how long one takes, the first worker measures"
    return out if len(out) > 1 else [out[0] + unknown]


def do_plan(options: Namespace) -> int:
    """Freeze the plan, publish the first round, print cost and promises."""
    from lsweep.plans.plan import Plan
    from lsweep.plans.rounds import Rounds, describe_refining
    from lsweep.storage.rows import row_type

    wanted = wanted_children(options)
    folder, problem, _ = planned(options)

    plan = Plan.read(folder)
    rounds = Rounds.read(folder, plan)
    row = row_type(len(plan.variables)).itemsize
    last = rounds.last
    units = sum(r.units(plan.slices) for r in rounds)
    leases = sum(r.leases(plan.slices) for r in rounds)
    samples = sum(d["samples"] or 0 for d in plan.data.values())
    whole = sum(d.get("of", d["samples"]) or 0 for d in plan.data.values())
    drawn = f"{samples or 'all'} of {whole}" if whole > samples else f"{samples or 'all'}"
    grid = " x ".join(str(c) for _, (_, _, c) in sorted(last.grid.items()))
    print(f"{folder.root}: plan {plan.digest[:12]}, grid {grid}, {rounds.total} points in "
          + counted(len(rounds.all), "round"))  # fmt: skip
    if last.refine is not None:
        more = f"; at most all {len(last.lattice)} points" if rounds.refining else ""
        print(f"  refinement: {describe_refining(last.refine)}{more}")
    print(f"  each point: {drawn} samples in {', '.join(plan.evaluate['splits'])}; "
          f"metrics {', '.join(plan.evaluate['metrics'])}")  # fmt: skip
    for line in otherwise(folder):
        print(f"  {line}")
    print(f"  {counted(units, 'unit')} of {counted(last.unit_points, 'point')}, "
          f"{counted(leases, 'lease')}; {counted(plan.slices, 'slice')}")  # fmt: skip
    print(f"  on disk: about {rounds.total * row * plan.slices / 2**20:.1f} MiB of rows, at most "
          f"{leases + 20} files and 2 more a worker; leases go once it is complete")  # fmt: skip
    for line in _cost(folder):
        print(f"  {line}")
    for axis in plan.axes:
        facts, kind = plan.facts["axes"][axis], plan.directions[axis]["kind"]
        if axis not in plan.moving:
            layers = f": {', '.join(plan.facts['layers'])}" if kind == "layer" else ""
            print(f"  {axis}: {kind}, moves nothing itself{layers}")
            continue
        print(f"  {axis}: norm {facts['norm']:.4g}, {facts['zero_filters']} filters of norm zero, "
              f"{len(facts['ignored'])} tensors held still"
              + (f": {', '.join(facts['ignored'])}" if facts["ignored"] else ""))  # fmt: skip
        if "eigenvalue" in facts:
            doubt = "" if facts["converged"] else ": it did not converge"
            print(f"     eigenvalue {facts['eigenvalue']:.4g}, residual {facts['residual']:.1e}"
                  + doubt + "".join(f"; {n}" for n in [facts.get("note")] if n))  # fmt: skip
            for line in along_eigenvectors(folder)[axis]:
                print(f"     {line}")
        if "slope" in facts:
            print(f"     norm of the gradient {facts['slope']:.4g}")
    vectors = [v for along in plan.facts.get("gauge", {}).values() for v in along.values()]
    if vectors:
        low, high = min(map(min, vectors)), max(map(max, vectors))
        print(f"  gauge equi: the same function, its weights rescaled by {low:.3g} to {high:.3g}")
    for i, a in enumerate(plan.axes):
        for j, b in enumerate(plan.axes[:i]):
            if {a, b} <= set(plan.moving):
                print(f"  cos({b}, {a}) = {plan.facts['cosines'][j][i]:+.4f}")
    print("  a kill -9 at any moment loses at most the unit in flight; a node's crash at most the "
          "last second")  # fmt: skip
    planned_children(folder, wanted, problem, options)
    more = f" --measures {options.measures}" if wanted else ""
    print(f"  next: lsweep run {folder.root}{more}")
    return 0


def _rank_of(options: Namespace) -> Rank:
    """The identity that was given, or else what the launcher says."""
    if options.index is None and options.of is None:
        rank = own_rank()
    else:
        index, of = options.index or 0, options.of or 1
        rank = Rank(index, of, index, job=own_rank().job)
    return rank if options.local is None else dataclasses.replace(rank, local=options.local)


def role_for(options: Namespace, rank: Rank, beat: float | None = None) -> Role:
    """Return how a worker takes part, as a command line says it."""
    if beat is None:  # each beat of each worker is three changes of the folder that holds them
        beat = min(60.0, max(10.0, rank.of / 100))
    return Role(rank.index, rank.of, rank.local, options.device, options.threads, options.claims,
                beat, options.trust, rank.job)  # fmt: skip


def do_work(options: Namespace) -> int:
    """Be one worker, or several on one device."""
    # One thread must be asked for before torch is imported.
    if options.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    folder = RunFolder(options.run)
    role = role_for(options, _rank_of(options), options.beat)
    # Its launcher knows the time limit, and asks for another turn for all its workers.
    end = None if options.parent else end_of_job()
    with Stop(end, options.parent) as stop:  # before torch is imported, which takes long
        if options.workers_per_gpu > 1:
            return _work_side_by_side(folder, role, options.workers_per_gpu, stop)
        time.sleep(delay(role.of))
        from lsweep.working.worker import work

        try:
            work(folder, role, stop=stop)
        except Stopped as e:
            again = None if options.parent else another_turn(stop.reason, e.points)
            _say_stopped(again, stop)
            return INTERRUPTED
    return 0


def _work_side_by_side(folder: RunFolder, role: Role, count: int, stop: Stop) -> int:
    from lsweep.runs.status import share_done
    from lsweep.working.launch import run_workers

    before = share_done(folder)[0]
    outcome = run_workers(folder, role, count, stop, one_device=True,
                          on_event=lambda text: print(text, file=sys.stderr))  # fmt: skip
    if not outcome.interrupted:
        return outcome.code
    _say_stopped(another_turn(stop.reason, share_done(folder)[0] - before), stop)
    return INTERRUPTED


def _say_stopped(again: str | None, stop: Stop) -> None:
    text = again or f"stopped by {stop.reason}; all that was committed is kept"
    print(f"lsweep: {text}", file=sys.stderr)


def do_init(options: Namespace) -> int:
    """Write the starter's files."""
    from lsweep.starter import write_starter

    for path in write_starter(options.folder):
        print(f"wrote {path}")
    print(f"next: edit them, then 'lsweep run {options.folder / 'sweep.toml'}'")
    return 0


def do_demo(options: Namespace) -> int:
    """Train, sweep and draw the two networks of the demo."""
    from lsweep.demo import demo

    return demo(options.folder, options.workers)
